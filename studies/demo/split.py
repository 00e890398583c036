"""Splits the objects: for some the text names the colour, for others the questions ask for the colour."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

from studies.demo.things import Thing
from valm.errors import ValmError
from valm.evaluation.sets import SETS, Item, find_file, load_memory_color

SPLITS = ("test", "validation")
HELD_OUT = 4  # one in so many


@dataclass(frozen=True)
class Split:
    """The objects of a demo.

    spoken: objects whose colour the text names.
    heldout: a quarter of the other objects, with the colour of their pixels. The text names them without a colour.
    memory: MemoryColor's objects with a picture, with the colour that people gave. The text names no colour of theirs.
    pictured: all of these in the order of their names, in a validation split also the test's held-out objects.
    """

    spoken: list[Thing]
    heldout: list[Item]
    memory: list[Item]
    pictured: list[Thing]

    @property
    def asked(self) -> list[Item]:
        return self.heldout + self.memory


def split_things(
    things: list[Thing], memory_color: list[Item], *, seed: int, split: str, max_things: int | None = None
) -> Split:
    """Splits the objects at random by `seed`.

    Args:
        split: "test", or "validation" for choosing settings: it sets the test's held-out objects aside and holds out a
            quarter of the rest.
        max_things: limit on the objects of either kind, for a miniature run.
    """
    if split not in SPLITS:
        raise ValmError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(seed)
    names = {thing.name for thing in things}
    memory = [item for item in memory_color if item.text in names]
    remembered = {item.text for item in memory}
    colored = [thing for thing in things if thing.color is not None and thing.name not in remembered]
    rng.shuffle(colored)
    if max_things is not None:
        colored, memory = colored[:max_things], memory[:max_things]
    test, rest = colored[: len(colored) // HELD_OUT], colored[len(colored) // HELD_OUT :]
    if split == "test":
        heldout, spoken = test, rest
    else:
        heldout, spoken = rest[: len(rest) // HELD_OUT], rest[len(rest) // HELD_OUT :]
    kept = {thing.name for thing in colored} | {item.text for item in memory}
    return Split(
        spoken=spoken,
        heldout=[Item(thing.name, thing.color, "the") for thing in heldout if thing.color is not None],
        memory=memory,
        pictured=[thing for thing in things if thing.name in kept],
    )


def find_memory_color(eval_data: str | os.PathLike | None) -> tuple[list[Item], str | None]:
    """MemoryColor's items, or an empty list and the reason.

    Args:
        eval_data: the table itself, or the folder of the evaluation sets. None: not given.
    """
    if eval_data is None:
        return [], "no evaluation data given (--eval-data or VALM_EVAL_DATA)"
    path = Path(eval_data)
    table = path if path.is_file() else find_file("memory_color", path)
    if table is None:
        return [], f"there is no {SETS['memory_color'].file} in {path}"
    return load_memory_color(table), None
