"""Pictures of what VaLM does in a study: the images that a question finds, the answer, and the attention."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from studies.color.conditions import Conditions
from studies.color.pictures import read_pictures
from studies.color.questions import set_items
from studies.color.study import Study
from studies.demo.questions import swap_red_and_blue
from studies.explanation_figures import explanation_rows
from studies.plots import INK, SERIES, new_figure
from valm.clip.clip import Clip
from valm.errors import ValmError
from valm.evaluation.questions import COLOR_PROMPTS, COLORS, fill
from valm.evaluation.sets import Item, load_memory_color
from valm.explain.explanation import Explanation, explain
from valm.model.checkpoint import load
from valm.store.files import writable_folder
from valm.text import printable
from valm_kernels.atomic_files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROMPT = COLOR_PROMPTS[7]  # "The typical color of [DESCRIPTOR] [ITEM] is"
EXAMPLES = 8
COLUMNS = 2
# Colours that change when the red and blue channels are exchanged. The attention is shown for a thing of such a colour.
EXCHANGED = ("red", "blue")
DRAWN, FAILURES = "Validation things, drawn at random", "Wrong about MemoryColor, of the items that have a picture"


class Example(NamedTuple):
    """A question about a thing, explained, and its right answer."""

    seen: Explanation
    right: str

    @property
    def answer(self) -> str:
        return self.seen.answers[int(self.seen.probabilities.argmax())]


def write_exhibits(study: Study, seed: int, figures: Path) -> None:
    """Writes study-examples.png and study-attention.png of a seed that has run.

    Things are drawn at random, so that nobody picks those that go well; the attention is that of the first validation
    thing with a right answer that the exchange of red and blue changes.

    Raises:
        ValmError: the seed has not run, or a file is missing.
    """
    folder = study.seed_folder(seed)
    if not (folder / "valm").is_dir():
        raise ValmError(
            f"{folder} has no VaLM of seed {seed}: run `python -m studies.color run` with the arm valm first"
        )
    figures = writable_folder(figures)
    pictures = read_pictures(study.pictures)
    clip = Clip.load(study.config.clip.get("pretrained", folder / "clip"))
    model, tokenizer = load(folder / "valm")
    conditions = Conditions(folder, clip, tokenizer, study.config.images, seed, pictures, study.pictures)
    found = conditions["retrieved"]

    def example(item: Item) -> Example:
        question = fill(PROMPT, item.text, item.descriptor, True)
        return Example(explain(model, tokenizer, question, retriever=found, answers=COLORS), item.answer)

    draw = random.Random(seed)
    things = load_memory_color(folder / "text" / "validation.csv")
    drawn = [example(item) for item in draw.sample(things, min(EXAMPLES, len(things)))]
    failures: list[Example] = []
    items = set_items("memory_color", study.data)
    for item in draw.sample(items, len(items)):
        if len(failures) < EXAMPLES and conditions.pictures_of(item.text):
            asked = example(item)
            if asked.answer != asked.right:
                failures.append(asked)
    _save(examples({DRAWN: drawn, FAILURES: failures}), figures / "study-examples.png")
    changed = [one for one in map(example, things) if one.answer == one.right in EXCHANGED]
    if changed:
        _save(explanation_rows(_exchanged(changed[0], model, tokenizer, conditions)), figures / "study-attention.png")


def _exchanged(one: Example, model: Any, tokenizer: Any, conditions: Conditions) -> dict[str, Explanation]:
    """The explanation of a question with the images as they are, and with red and blue exchanged in them."""
    other = explain(model, tokenizer, one.seen.text, retriever=conditions["exchanged"], answers=COLORS)
    images = [
        replace(image, thumbnail=None if image.thumbnail is None else swap_red_and_blue(image.thumbnail))
        for image in one.seen.images
    ]
    return {
        "the images found": one.seen,
        "red and blue exchanged in them": replace(other, images=tuple(images), image_index=one.seen.image_index),
    }


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight", facecolor="white")


def examples(groups: Mapping[str, Sequence[Example]]) -> Figure:
    """Each question with the images of its last token, best first, and its answer; wrong ones in another colour."""
    heights = [0.4 + 0.75 * -(-max(len(group), 1) // COLUMNS) for group in groups.values()]
    figure = new_figure(12, sum(heights))
    parts = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, group) in zip(parts, groups.items(), strict=True):
        part.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
        rows = -(-max(len(group), 1) // COLUMNS)
        for place, axes in enumerate(np.ravel(part.subplots(rows, COLUMNS, squeeze=False))):
            axes.set_xlim(0, 11)
            axes.set_ylim(0, 1)
            axes.set_aspect("equal")
            axes.axis("off")
            if place < len(group):
                _draw(axes, group[place])
    return figure


def _draw(axes: Axes, example: Example) -> None:
    images = example.seen.images_of(-1)
    for number, image in enumerate(images):
        if image.thumbnail is not None:
            axes.imshow(np.asarray(image.thumbnail.convert("RGB")), extent=(number, number + 0.95, 0.02, 0.97))
    wrong = example.answer != example.right
    answer = example.answer + (f" (right: {example.right})" if wrong else "")
    axes.text(len(images) + 0.15, 0.62, printable(example.seen.text), va="center", fontsize=8, color=INK)
    axes.text(len(images) + 0.15, 0.25, answer, va="center", fontsize=9, color=SERIES[1 if wrong else 0], weight="bold")
    axes.set_xlim(0, 11)
    axes.set_ylim(0, 1)
