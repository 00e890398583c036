"""Writes explanations, side by side, into one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from valm.explain.explanation import Explanation
from valm.explain.images import THUMBNAIL_SIZE
from valm.knowledge_base.encode import thumbnail_bytes
from valm.store.files import output_file

HERE = Path(__file__).parent
# The page stores the weights of every head as integers in this unit.
WEIGHT_UNIT = 1e-4


def write_page(path: str | os.PathLike, explanations: Mapping[str, Explanation]) -> None:
    """Writes explanations of one text to an HTML page that needs no other file.

    The page shows the answers, the images of each token and the attention of each head. It is written completely or
    not at all.

    Args:
        path: the file to write; an existing file is replaced.
        explanations: explanations of one text by title, such as the name of the model.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> from pathlib import Path
        >>> from valm.explain.explanation import explain
        >>> from valm.explain.page import write_page
        >>> model, tokenizer = valm.load("model", kb="kb", clip="clip")
        >>> write_page("explanation.html", {"VaLM": explain(model, tokenizer, "a picture of")})
        >>> "a picture of" in Path("explanation.html").read_text()
        True
    """
    page = render_page(explanations)
    with output_file(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render_page(explanations: Mapping[str, Explanation]) -> str:
    """The page as HTML. Everything is escaped, and its policy forbids all requests and every script but its own."""
    script = heads_script() + 'chooseHeads(document, JSON.parse(document.getElementById("heads").textContent));\n'
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            **_content(explanations),
            style=Markup(style()),
            script=Markup(script),
            script_hash=script_hash(script),
            heads=heads(explanations),
        )
    )


def render_body(explanations: Mapping[str, Explanation]) -> str:
    """The body of the page. It needs `style()`; choosing a head also needs `heads_script()` and `heads`."""
    return _environment().get_template("body.html.j2").render(**_content(explanations))


def heads(explanations: Mapping[str, Explanation]) -> list[dict[str, Any]]:
    """What chooseHeads in `heads_script` shows: for each explanation the mean weights and the weights of every head, as
    T rows of T + K integers in WEIGHT_UNIT, and the weight of a full bar."""
    largest = max(1, round(_largest_image(explanations) / WEIGHT_UNIT))
    return [_heads(explanation) | {"largest": largest} for explanation in explanations.values()]


@cache
def style() -> str:
    """The CSS of pages and bodies, all inside the class `valm-explain`."""
    return (HERE / "style.css").read_text(encoding="utf-8")


@cache
def heads_script() -> str:
    return (HERE / "heads.js").read_text(encoding="utf-8")


def script_hash(script: str) -> str:
    """The name of this script in a page's policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def thumbnail_uri(image: Image.Image) -> str:
    """A thumbnail of the image as a data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(thumbnail_bytes(image, THUMBNAIL_SIZE)).decode()


def templates(*folders: Path) -> Environment:
    """The templates of pages in `folders`. Everything is escaped, and a missing value raises an error."""
    return Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _environment() -> Environment:
    environment = templates(HERE)
    environment.filters["percent"] = lambda share: int(100 * share + 0.5)  # rounded as the script does
    environment.filters["probability"] = lambda p: "<0.1%" if 0 < p < 0.0005 else f"{p:.1%}"
    return environment


def _content(explanations: Mapping[str, Explanation]) -> dict[str, Any]:
    first = next(iter(explanations.values()))
    largest = _largest_image(explanations)
    settings = [
        _setting(number, title, explanation, largest)
        for number, (title, explanation) in enumerate(explanations.items())
    ]
    return {"text": first.text, "settings": settings, "largest_image": largest}


def _largest_image(explanations: Mapping[str, Explanation]) -> float:
    """The largest weight of an image in any head of any explanation, shown as a full bar."""
    return max(float(explanation.image_weights.max(initial=0.0)) for explanation in explanations.values()) or 1.0


def _setting(number: int, title: str, explanation: Explanation, largest_image: float) -> dict[str, Any]:
    """An explanation for the template, averaged over the heads."""
    text, image = explanation.weights()
    sources = [None if shown.thumbnail is None else thumbnail_uri(shown.thumbnail) for shown in explanation.images]
    width = len(explanation.tokens) + image.shape[1]

    def shown(token: int, rank: int, row: int) -> dict[str, Any]:
        weight = float(image[token, rank])
        return {
            "source": sources[row],
            "caption": explanation.images[row].caption,
            "score": float(explanation.scores[token, rank]),
            "weight": weight,
            "bar": weight / largest_image,
            "place": token * width + len(explanation.tokens) + rank,
        }

    tokens = [
        {
            "text": token,
            "share": float(image[number].sum()),
            "images": [shown(number, rank, row) for rank, row in enumerate(rows) if row >= 0],
            "attention": [
                {"weight": weight, "place": number * width + other}
                for other, weight in enumerate(text[number, : number + 1].tolist())
            ],
        }
        for number, (token, rows) in enumerate(zip(explanation.tokens, explanation.image_index.tolist(), strict=True))
    ]
    probabilities = explanation.probabilities.tolist()
    best = int(np.argmax(probabilities)) if probabilities else None
    return {
        "number": number,
        "title": title,
        "note": explanation.note,
        "num_heads": len(explanation.text_weights),
        "has_images": bool(explanation.images),
        "tokens": tokens,
        "answers": [
            {"word": word, "probability": probability, "best": place == best}
            for place, (word, probability) in enumerate(zip(explanation.answers, probabilities, strict=True))
        ],
        "others": max(0.0, 1.0 - sum(probabilities)),
    }


def _heads(explanation: Explanation) -> dict[str, Any]:
    joint = np.concatenate([explanation.text_weights, explanation.image_weights], -1)  # (H, T, T + K)
    every = np.concatenate([joint.mean(0, keepdims=True), joint])
    return {
        "tokens": len(explanation.tokens),
        "weights": np.rint(every / WEIGHT_UNIT).astype(int).reshape(len(every), -1).tolist(),
    }
