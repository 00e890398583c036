"""The page of a server: type a prompt, and see its images, attention and answers change."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from valm.errors import ValmError
from valm.evaluation.controls import GivenImages, RandomImages, named_images
from valm.explain.explanation import Explanation, Reader, explain_together
from valm.explain.page import heads, heads_script, render_body, script_hash, style
from valm.retrieval.retriever import Retriever
from valm.serving.api import Api, ApiError, json_body
from valm_kernels.json_files import short

HERE = Path(__file__).parent
MAX_BODY = 64 << 20  # bytes of a request, with its images, which live for one answer
MAX_IMAGES = 16  # of the slider; the operation takes more
MAX_UPLOADS, UPLOADS_AT_ONCE = 64, 2
# Characters of the prompt, which models of 4,096 tokens and more read, of all answers, and of an image's name, which the
# page repeats at each token.
MAX_PROMPT, MAX_ANSWERS, MAX_NAME = 20_000, 2_000, 255

RETRIEVED, RANDOM, UPLOADED, NONE = "retrieved", "random", "uploaded", "none"
QUERY = "its own query (blind)"  # the one image of a blind model


class Stop(NamedTuple):
    """A prepared example of the tour, and what to look for."""

    name: str
    prompt: str
    images: str
    hint: str


TOMATO = "the most common color of tomato is"
TOUR = (
    Stop(
        "1. What it looks at",
        TOMATO,
        RETRIEVED,
        "Every token finds images of its own. See what the last token found, and whether the answer follows it.",
    ),
    Stop(
        "2. Other images",
        TOMATO,
        RANDOM,
        "The control: random images of the knowledge base stand in the place of the retrieved ones. An answer that "
        "came from the images changes.",
    ),
    Stop("3. No images", TOMATO, NONE, "The text alone: what the model would say without looking."),
)


class Upload(BaseModel):
    """An image of the reader's own. data: the file in base64."""

    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(max_length=MAX_NAME)]
    data: str


class Asked(BaseModel):
    """What the page asks for.

    Attributes:
        images: one of `Page.choices`.
        k: images per token.
        answers: words separated by commas; empty for the likeliest.
        beside: which of `Page.beside` to show too.
    """

    model_config = ConfigDict(strict=True)

    prompt: Annotated[str, Field(max_length=MAX_PROMPT)]
    images: str
    k: int = 1
    answers: Annotated[str, Field(max_length=MAX_ANSWERS)] = ""
    beside: list[str] = []
    uploads: Annotated[list[Upload], Field(max_length=MAX_UPLOADS)] = []


class Page:
    """The page's handlers, and what they show.

    Args:
        api: whose engine has the model.
        other: a second model, to compare, as (name, model, tokenizer).
    """

    def __init__(self, api: Api, other: tuple[str, Any, Any] | None = None):
        self.api, self.name, self.other = api, api.name, other
        self._uploads = asyncio.Semaphore(UPLOADS_AT_ONCE)  # each with a body of MAX_BODY
        self.model, self.tokenizer = api.engine.model, api.engine.tokenizer
        retriever = self.model.retriever
        if self.model.fusion_options.num_images == 0:
            self.choices = [NONE]
        elif isinstance(retriever, Retriever):
            self.choices = [RETRIEVED, RANDOM, UPLOADED, NONE]
        else:
            self.choices = [QUERY, NONE]
        self.beside = [self.choices[0], *([self.other[0]] if self.other else [])]

    async def show(self, request: Request) -> Response:
        """The page."""
        script = heads_script() + _own("page.js")
        policy = (
            f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{script_hash(script)}'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        page = _template().render(
            name=self.name,
            choices=self.choices,
            beside=self.beside,
            k=max(self.model.fusion_options.num_images, 1),
            most_images=self._max_images(),
            has_kb=RETRIEVED in self.choices,
            uploaded=UPLOADED,
            tour=[stop for stop in TOUR if stop.images in self.choices],
            most_bytes=MAX_BODY,
            style=Markup(style() + _own("page.css")),
            script=Markup(script),
        )
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    async def explain(self, request: Request) -> Response:
        """The body of an explanation and the weights of its heads, as JSON.

        Raises:
            ApiError: the question does not fit.
        """
        async with self._uploads:
            try:
                asked = Asked.model_validate_json(await json_body(request, MAX_BODY))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                field = ".".join(map(str, first["loc"])) or "the request"
                raise ApiError(400, f"{field} does not fit: {first['msg']}, got {short(first['input'])}") from None
            try:
                explanations = await self.api.in_turn(lambda: self.explanations(asked))
            except ValmError as error:
                raise ApiError(400, str(error)) from None
        return JSONResponse({"body": render_body(explanations), "heads": heads(explanations)})

    def explanations(self, asked: Asked) -> dict[str, Explanation]:
        """The explanations that are shown, by their titles.

        Raises:
            ValmError: what is asked for cannot be shown.
        """
        if asked.images not in self.choices:
            raise ValmError(f"images is {asked.images!r}, expected one of {', '.join(self.choices)}")
        if RETRIEVED in self.choices and not 1 <= asked.k <= self._max_images():
            raise ValmError(f"K is {asked.k}, expected 1 to {self._max_images()}")
        title, reader = self._reader(asked.images, asked.k, asked.uploads)
        readers = {title: reader}
        if self.choices[0] in asked.beside and asked.images != self.choices[0]:
            first, with_first = self._reader(self.choices[0], asked.k, [])
            readers = {first: with_first} | readers
        if self.other is not None and self.other[0] in asked.beside:
            readers[self.other[0]] = Reader(*self.other[1:])
        words = [word.strip() for word in asked.answers.split(",")] if asked.answers.strip() else None
        return explain_together(readers, asked.prompt, words)

    def _reader(self, images: str, k: int, uploads: Sequence[Upload]) -> tuple[str, Reader]:
        """A reader with these images, and its title."""
        if images == NONE:
            return f"{self.name}, no images", Reader(self.model, self.tokenizer, with_images=False)
        if images == QUERY:
            return f"{self.name}, blind", Reader(self.model, self.tokenizer)
        retriever: Any = self.model.retriever.with_k(k)
        title = f"{k} {images} images"
        if images == RANDOM:
            retriever = RandomImages(retriever, 0)
        elif images == UPLOADED:
            title, retriever = "uploaded images", GivenImages(retriever, _decoded(uploads[:k]))
        return f"{self.name}, {title}", Reader(self.model, self.tokenizer, retriever)

    def _max_images(self) -> int:
        in_kb = len(self.model.retriever.kb) if RETRIEVED in self.choices else 1
        return max(1, self.model.fusion_options.num_images, min(MAX_IMAGES, in_kb))


def _decoded(uploads: Sequence[Upload]) -> list[Any]:
    """The uploaded images, with their names."""
    if not uploads:
        raise ValmError("there are no uploaded images yet: add some in More controls")
    try:
        contents = [(upload.name, io.BytesIO(base64.b64decode(upload.data, validate=True))) for upload in uploads]
    except ValueError:
        raise ValmError("the uploaded images are not in base64") from None
    return named_images(contents)


@cache
def _own(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2")
