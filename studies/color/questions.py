"""The questions of a study, about validation objects and the test sets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from studies.color.config import SETS as SET_NAMES
from studies.color.config import VALIDATION
from valm.errors import ValmError
from valm.evaluation.files import read_csv
from valm.evaluation.questions import FAIR, Questions, build
from valm.evaluation.sets import SETS, Item, find_file, read_set

# The sets about colours, whose items' colours no training text says.
COLOR_SETS = SET_NAMES[:3]
FLICKR_CAPTIONS = Path("flickr8k_1000", "captions.txt")
CAPTIONS = 200
# Of held-out text, the kind that these are.
CAPTIONS_KIND = "captions"
VICOMTE_TRAINING_FILE = "color_single_train.jsonl"


def set_items(name: str, data: str | os.PathLike | None) -> list[Item]:
    """The items of a set of `valm eval`. ViComTe colour includes its training part, which nothing here is trained on.

    Raises:
        ValmError: a file is missing or damaged.
    """
    items = read_set(SETS[name], data)
    if name == "vicomte_color":
        file = find_file(name, data)
        assert file is not None  # read_set has read it
        training = file.with_name(VICOMTE_TRAINING_FILE)
        if not training.is_file():
            raise ValmError(f"there is no {training}: the study asks both parts of ViComTe colour")
        items = items + SETS[name].load(training)
    return items


def item_names(sets: Sequence[str], data: str | os.PathLike | None) -> list[str]:
    """The distinct names of the items in some sets, by which training text is filtered."""
    return list(dict.fromkeys(item.text for name in sets for item in set_items(name, data)))


def photographs(data: str | os.PathLike | None) -> dict[str, list[str]]:
    """The captions of each picture of Flickr8k, in the order of their names; empty if `data` has no Flickr8k."""
    table = None if data is None else Path(data) / FLICKR_CAPTIONS
    if table is None or not table.is_file():
        return {}
    captions: dict[str, list[str]] = {}
    for row in read_csv(table, ["image", "caption"]):
        captions.setdefault(row["image"], []).append(row["caption"])
    return dict(sorted(captions.items()))


def flickr_captions(data: str | os.PathLike | None) -> list[str]:
    """The first captions of some pictures of Flickr8k."""
    return [captions[0] for captions in list(photographs(data).values())[:CAPTIONS]]


def set_questions(name: str, data: str | os.PathLike | None) -> Questions:
    """The questions of a set in the fair protocol."""
    return build(SETS[name], set_items(name, data), FAIR)  # type: ignore[return-value]  # these sets have no documents


def validation_questions(things: Sequence[Item]) -> Questions:
    """The nine colour prompts about the validation objects."""
    asked = build(SETS["memory_color"], list(things), FAIR)
    assert isinstance(asked, Questions)
    return dataclasses.replace(asked, task=VALIDATION)
