"""report.html: one file with the demo's table, figures and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from PIL import Image

from studies import plots
from studies.demo.corpus import begins_a_sentence
from studies.demo.exhibits import Exhibits
from studies.demo.things import CREDIT
from valm.evaluation.questions import COLOR_PROMPTS
from valm.explain.explanation import Explanation
from valm.pictures.page import write_page
from valm.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent

SWATCHES = {
    "white": "#fbfbfb",
    "yellow": "#f5d327",
    "green": "#5c9e31",
    "red": "#d22f27",
    "grey": "#9b9b9a",
    "brown": "#7a5230",
    "black": "#222222",
    "blue": "#3f8fd0",
    "purple": "#8967aa",
    "pink": "#f59ab4",
    "orange": "#e27022",
}
ROW_NAMES = {
    "valm": "VaLM, 4 retrieved pictures per token",
    "gpt2": "text-only baseline (GPT-2*)",
    "blind": "query control (Blind): its query instead of pictures",
    "random_images": "VaLM, random pictures at test time",
    "majority": "always the most frequent colour",
}
# The curves of the language models, by the stage that trained them.
ROWS_OF_LOSSES = {"gpt2": "text-only baseline", "model": "VaLM", "control": "query control"}


def write_report(
    path: Path, results: Mapping[str, Any], losses: Mapping[str, Sequence[float]], exhibits: Exhibits
) -> None:
    """Writes the report, all or nothing. Everything is escaped, and the page makes no request."""
    write_page(
        path,
        HERE / "report.html.j2",
        filters={"png_uri": png_uri, "counts": _counts},
        results=results,
        row_names=ROW_NAMES,
        swatches=SWATCHES,
        among_answers=among_answers,
        credit=CREDIT,
        prompts={prompt: begins_a_sentence(prompt) for prompt in COLOR_PROMPTS},
        exhibits=exhibits,
        attention=attention(exhibits.examples[0].seen),
        language_losses=svg(plots.loss_curves({ROWS_OF_LOSSES[name]: losses[name] for name in ROWS_OF_LOSSES})),
        clip_losses=svg(plots.loss_curves({"CLIP": losses["clip"]})),
    )


def attention(seen: Explanation) -> list[dict[str, Any]]:
    """A row for each token: its mean attention, over the heads, to the text up to it and to its images.

    The opacity of an image is 1 for the largest share of all images."""
    text, images = seen.weights()
    largest = float(images.max(initial=0)) or 1.0
    return [
        {
            "token": printable(token),
            "text": text[row, : row + 1].tolist(),
            "images": [
                {"picture": seen.images[number].thumbnail, "title": seen.images[number].caption, "share": share}
                | {"opacity": 0.15 + 0.85 * share / largest}
                for number, share in zip(seen.image_index[row].tolist(), images[row].tolist(), strict=True)
                if number >= 0
            ],
        }
        for row, token in enumerate(seen.tokens)
    ]


def among_answers(seen: Explanation, answer: str) -> float:
    """The probability of an answer among the answers."""
    return float(seen.probabilities[seen.answers.index(answer)] / seen.probabilities.sum())


def _counts(counts: Mapping[str, int]) -> str:
    """The three most frequent answers."""
    most = sorted(counts.items(), key=lambda entry: -entry[1])
    return ", ".join(f"{color} {count}" for color, count in most[:3]) + (" …" if len(most) > 3 else "")


def svg(figure: Figure) -> Markup:
    """The figure as an SVG element, its texts as text, its ink as the page's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight")
    text = buffer.getvalue().replace(plots.INK, "var(--ink)").replace(plots.FAINT, "var(--faint)")
    return Markup(text[text.index("<svg") :])


def png_uri(picture: Image.Image) -> str:
    """The picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
