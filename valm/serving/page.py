"""The page of a server: type a prompt and see its images, attention and answers change."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, NamedTuple, TypeVar

from markupsafe import Markup
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from valm.clip.read_image import check_size, open_image, read_image
from valm.errors import ValmError
from valm.evaluation.controls import GivenImages, NamedImage, RandomImages
from valm.explain.explanation import Explanation, Reader, explain_together
from valm.explain.page import heads, heads_script, render_body, script_hash, style, templates
from valm.retrieval.retriever import Retriever
from valm.serving.api import Api, unless_gone
from valm.serving.bodies import Bodies
from valm.serving.errors import ApiError, BusyError, StoppingError
from valm.text import first_half
from valm_kernels.json_files import short

HERE = Path(__file__).parent
MAX_BODY = 64 << 20  # bytes of a request with its images, which are kept for one answer
MAX_IMAGES = 16  # of the slider; the operation allows more
MAX_UPLOADS = 64
ANSWERED_AT_ONCE = 2  # requests whose images are in memory
# Maximum decoded pixels of all images of a request (1 GB if they are one image), and maximum scans of a JPEG.
MAX_DECODED, MAX_SCANS = 1 << 25, 100
# Pixels of an uploaded image's side: a JPEG is decoded to at least this, and twice this is kept. CLIP reads 224 to 448.
KEPT_SIDE = 512
# Maximum characters of the prompt, of all answers, and of an image's name, which each token repeats.
MAX_PROMPT, MAX_ANSWERS, MAX_NAME = 20_000, 2_000, 255

RETRIEVED, RANDOM, UPLOADED, NONE = "retrieved", "random", "uploaded", "none"
QUERY = "its own query (blind)"  # the one image of a blind model
# The first prompt if no caption is found among this many images.
PROMPT, CAPTIONS_READ = "a picture of", 100
MAX_CAPTION = 80  # characters of a caption that count

Result = TypeVar("Result")


class Stop(NamedTuple):
    """Images to try with the first prompt, and what to look for."""

    name: str
    images: str
    hint: str


TOUR = (
    Stop(
        "1. What it looks at",
        RETRIEVED,
        "Every token finds its own images. See what the last token found, and whether the answer follows it.",
    ),
    Stop(
        "2. Other images",
        RANDOM,
        "The control: random images of the knowledge base replace the retrieved images. An answer that came from the "
        "images changes.",
    ),
    Stop("3. No images", NONE, "Only the text: what the model would say without looking."),
)


class Upload(BaseModel):
    """The reader's own image. data: the file in base64."""

    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(max_length=MAX_NAME)]
    data: str


class Asked(BaseModel):
    """What the page asks for.

    Attributes:
        images: one of `Page.choices`.
        k: images per token.
        answers: words separated by commas; empty for the likeliest.
        beside: which of `Page.beside` to show for comparison.
    """

    model_config = ConfigDict(strict=True)

    prompt: Annotated[str, Field(max_length=MAX_PROMPT)]
    images: str
    k: int = 1
    answers: Annotated[str, Field(max_length=MAX_ANSWERS)] = ""
    beside: list[str] = []
    uploads: Annotated[list[Upload], Field(max_length=MAX_UPLOADS)] = []


class Page:
    """The page's handlers and what they show.

    Args:
        api: its engine holds the model.
        other: a second model to compare, as (name, model, tokenizer).
    """

    def __init__(self, api: Api, other: tuple[str, Any, Any] | None = None):
        self.api, self.name, self.other = api, api.name, other
        self._bodies = Bodies()  # its own, so that uploads take no room from the API
        self._open = 0  # requests that have arrived
        self._places = asyncio.Semaphore(ANSWERED_AT_ONCE)
        self._aside = ThreadPoolExecutor(1, "page")  # one thread, so that only one task uses memory at a time
        self.model, self.tokenizer = api.engine.model, api.engine.tokenizer
        retriever = self.model.retriever
        if self.model.fusion_options.num_images == 0:
            self.choices = [NONE]
        elif isinstance(retriever, Retriever):
            self.choices = [RETRIEVED, RANDOM, UPLOADED, NONE]
        else:
            self.choices = [QUERY, NONE]
        self.prompt = PROMPT
        if RETRIEVED in self.choices:
            kb = retriever.kb
            self.prompt = first_prompt(kb.item(id).caption for id in range(min(len(kb), CAPTIONS_READ)))
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
            prompt=self.prompt,
            tour=[stop for stop in TOUR if stop.images in self.choices],
            most_bytes=MAX_BODY,
            icon=base64.b64encode(_own("icon.svg").encode()).decode(),
            style=Markup(style() + _own("page.css")),
            script=Markup(script),
        )
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    async def explain(self, request: Request) -> Response:
        """The body of an explanation and the weights of its heads, as JSON. Raises ApiError if the request is
        invalid."""
        async with self._bodies.held(request, MAX_BODY) as body:
            if self._open >= ANSWERED_AT_ONCE + self.api.engine.max_waiting:
                raise BusyError(f"{self._open:,} requests of the page are already waiting")
            self._open += 1
            try:
                return await unless_gone(request, self._explained(body))
            except ValmError as error:
                raise ApiError(400, str(error)) from None
            finally:
                self._open -= 1
                self._aside.submit(_return_memory)

    async def _explained(self, body: bytearray) -> Response:
        """The answer. It may be cancelled between two images."""
        async with self._places:
            asked, opened = await self._beside(self._read, body)
            images = [await self._beside(_small, *image) for image in opened]
            explanations = await self.api.engine.call(lambda: self.explanations(asked, images))
            return await self._beside(_written, explanations)

    async def _beside(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What `function` returns on the page's thread. Raises StoppingError if the server stops."""
        if self.api.engine.ended:
            raise StoppingError
        return await asyncio.get_running_loop().run_in_executor(self._aside, function, *arguments)

    def _read(self, body: bytearray) -> tuple[Asked, list[NamedImage]]:
        """A request and its images, of which only the headers are read. Raises ValmError if the request is invalid or
        cannot be shown."""
        try:
            asked = Asked.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the request"
            raise ValmError(f"{field} is invalid: {first['msg']}, got {short(first['input'])}") from None
        if asked.images not in self.choices:
            raise ValmError(f"images is {asked.images!r}, expected one of {', '.join(self.choices)}")
        if RETRIEVED in self.choices and not 1 <= asked.k <= self._max_images():
            raise ValmError(f"K is {asked.k}, expected 1 to {self._max_images()}")
        return asked, _opened(asked.uploads[: asked.k]) if asked.images == UPLOADED else []

    def explanations(self, asked: Asked, images: Sequence[NamedImage] = ()) -> dict[str, Explanation]:
        """The explanations to show, by title. images: the uploaded images.

        Raises:
            ValmError: as in `explain`.
        """
        readers = dict([self._reader(asked.images, asked.k, images)])
        if self.choices[0] in asked.beside and asked.images != self.choices[0]:
            readers = dict([self._reader(self.choices[0], asked.k)]) | readers
        if self.other is not None and self.other[0] in asked.beside:
            readers[self.other[0]] = Reader(*self.other[1:])
        words = [word.strip() for word in asked.answers.split(",")] if asked.answers.strip() else None
        return explain_together(readers, asked.prompt, words)

    def _reader(self, images: str, k: int, uploaded: Sequence[NamedImage] = ()) -> tuple[str, Reader]:
        """A reader with these images, after its title."""
        if images == NONE:
            return f"{self.name}, no images", Reader(self.model, self.tokenizer, with_images=False)
        if images == QUERY:
            return f"{self.name}, blind", Reader(self.model, self.tokenizer)
        retriever: Any = self.model.retriever.with_k(k)
        title = f"{k} {images} images"
        if images == RANDOM:
            retriever = RandomImages(retriever, 0)
        elif images == UPLOADED:
            title, retriever = "uploaded images", GivenImages(retriever, uploaded)
        return f"{self.name}, {title}", Reader(self.model, self.tokenizer, retriever)

    def _max_images(self) -> int:
        in_kb = len(self.model.retriever.kb) if RETRIEVED in self.choices else 1
        return max(1, self.model.fusion_options.num_images, min(MAX_IMAGES, in_kb))


def first_prompt(captions: Iterable[str]) -> str:
    """The first half of a caption, so that the page begins with images that fit its prompt. A caption of one or two
    words, such as the name of an object, serves if no caption is longer."""
    lines = (caption.partition("\n")[0] for caption in captions)
    prompts = [first_half(shorten(line, MAX_CAPTION, placeholder="")) for line in lines]
    return max(prompts, key=lambda prompt: len(prompt.split()[:3]), default="") or PROMPT


def _opened(uploads: Sequence[Upload]) -> list[NamedImage]:
    """The uploaded images with their names; only the headers are read. Raises ValmError if there are no images or too
    many pixels, or a file is no image."""
    if not uploads:
        raise ValmError("there are no uploaded images yet: add some in More controls")
    images, pixels = [], 0
    for upload in uploads:
        with _readable(upload.name):
            content = base64.b64decode(upload.data, validate=True)
            if content[:2] == b"\xff\xd8" and content.count(b"\xff\xda") > MAX_SCANS:
                raise ValueError(f"a JPEG of more than {MAX_SCANS} scans, each decoded at full size")
            image = open_image(io.BytesIO(content))
            check_size(image)
            image.draft(None, (KEPT_SIDE, KEPT_SIDE))  # decodes a JPEG at this size or a few times larger
        pixels += image.width * image.height
        images.append((upload.name, image))
    if pixels > MAX_DECODED:
        raise ValmError(f"the images have {pixels:,} pixels, at most {MAX_DECODED:,} are allowed: use smaller images")
    return images


def _small(name: str, image: Image.Image) -> NamedImage:
    """An opened image, decoded and made small. Raises ValmError if it cannot be decoded."""
    with _readable(name):
        small = read_image(image)
    image.close()  # frees its pixels, since the request still refers to it
    small.thumbnail((2 * KEPT_SIDE, 2 * KEPT_SIDE))
    return name, small


def _written(explanations: dict[str, Explanation]) -> Response:
    return JSONResponse({"body": render_body(explanations), "heads": heads(explanations)})


def _return_memory() -> None:
    """Returns freed memory to the system; otherwise `valm` lets glibc keep 2 GiB."""
    with suppress(AttributeError, TypeError):  # other C libraries and systems
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # decoders raise many types for damaged bytes
        raise ValmError(f"cannot read the image {name}: {error}") from error


@cache
def _own(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    return templates(HERE).get_template("page.html.j2")
