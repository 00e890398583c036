"""The results of all seeds as one long table of hits and tries per item, and the numbers computed from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from studies.color.config import ARMS, arm_of, name_of
from valm.errors import ValmError
from valm.evaluation.questions import YES_NO, objects_of
from valm.evaluation.statistics import paired, ratio
from valm.store.files import Count, read_json
from valm_kernels.json_files import short

# The measures. RAW counts correct answers. CALIBRATED first divides each candidate's probability by its mean over the
# items; APART takes that mean separately over items with and items without a picture. SHOWN counts answers with the
# colour of the item's pictures, whatever the correct answer is. NATS sums a text's nats. The tests of EXCHANGES count
# answers with the colour of the exchanged images.
RAW, CALIBRATED, APART, SHOWN, NATS = "raw", "calibrated", "calibrated apart", "shown", "nats"
# The items of two sets that people labelled, each item once.
PEOPLE, PEOPLE_SETS = "people", ("memory_color", "color_terms")
# The images that the tokens of a row may see.
SEEN = {images for arm in ARMS.values() for images in arm.tests}
_Number = Annotated[float, Field(ge=0)]
ArmTest = tuple[str, str]  # an arm, and what its tokens see


class AskedJson(TypedDict):
    """What `measure` counts in the set or kind of text `of`.

    tries: how often an item was asked, or the number of a text's tokens.
    answers: the correct answers, empty if they differ by prompt.
    pictured: whether the knowledge base contains a picture of the item. An empty list if nobody looked.
    pixels: the colour word of the item's pictures, empty if no colour prevails. An empty list if nobody looked.
    """

    of: str
    measure: str
    items: Annotated[list[str], Field(min_length=1)]
    tries: list[Annotated[int, Field(ge=1)]]
    answers: list[str]
    pictured: list[bool]
    pixels: list[str]


class RowJson(TypedDict):
    """hits: of each item."""

    arm: str
    images: str
    of: str
    measure: str
    hits: list[_Number]


class ConfigJson(TypedDict, total=False):
    """The fields of a study's config that a curve depends on."""

    training: dict[str, Any]
    curve: list[int]


class SeedJson(TypedDict):
    """A results file: one seed."""

    study: str
    recipe: str
    config: ConfigJson
    seed: Count
    missing: list[str]
    asked: list[AskedJson]
    rows: list[RowJson]
    versions: dict[str, str]
    hardware: str
    threads: Count


class Asked(NamedTuple):
    """As `AskedJson`, in arrays."""

    items: np.ndarray
    tries: np.ndarray
    answers: np.ndarray
    pictured: np.ndarray
    pixels: np.ndarray

    def is_of(self, count: int) -> bool:
        """Whether it describes `count` items."""
        return len(self.items) == len(self.tries) == count and {*map(len, self[2:])} <= {0, count}


class Row(NamedTuple):
    """Rows of the long table, for one seed, arm, test, set and measure."""

    seed: int
    arm: ArmTest
    of: str
    measure: str
    asked: Asked
    hits: np.ndarray  # (items,)


class Found(NamedTuple):
    """A number with its 95 % interval, its seeds and its number of items. p: p-value of a difference in one seed."""

    value: float
    low: float
    high: float
    seeds: tuple[int, ...]
    items: int
    p: float | None = None


Keep = Callable[[Asked], np.ndarray]


def every(asked: Asked) -> np.ndarray:
    """All items."""
    return np.ones(len(asked.items), bool)


def pictured(asked: Asked) -> np.ndarray:
    """The items with a picture in the knowledge base."""
    return asked.pictured


def unpictured(asked: Asked) -> np.ndarray:
    return ~asked.pictured


def pixels_agree(asked: Asked) -> np.ndarray:
    """The items whose pictures have the colour of the answer."""
    return (asked.pixels == asked.answers) & (asked.answers != "")


@dataclass(frozen=True)
class Results:
    """The results of several seeds of one recipe.

    Some seeds may lack arms or tests of other seeds. A number covers the seeds that have it, and lists them (`Found`).

    Args:
        seeds: the results files without their table.
        rows: the table.
    """

    seeds: tuple[Any, ...]
    rows: tuple[Row, ...]

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        return tuple(seed["seed"] for seed in self.seeds)

    @cached_property
    def arms(self) -> list[ArmTest]:
        """The arms of all rows, in the order of the rows."""
        return list(dict.fromkeys(row.arm for row in self.rows))

    def having(self, *asked: tuple[str, ArmTest]) -> Results:
        """The results of the seeds in which every (set or text, arm) of `asked` was asked."""
        found = {(row.seed, row.of, row.arm) for row in self.rows}
        return self.of_seeds([seed for seed in self.numbers if all((seed, *one) in found for one in asked)])

    def of_seeds(self, numbers: Sequence[int]) -> Results:
        seeds = tuple(seed for seed in self.seeds if seed["seed"] in numbers)
        return Results(seeds, tuple(row for row in self.rows if row.seed in numbers))

    @cached_property
    def _table(self) -> dict[tuple[int, ArmTest, str, str], Row]:
        return {(row.seed, row.arm, row.of, row.measure): row for row in self.rows}

    def accuracy(self, arm: ArmTest, of: str, measure: str = RAW, keep: Keep = every) -> Found | None:
        """The share of correct answers to the items that `keep` chooses, over the seeds with this number. None if no
        seed has it."""
        found = self._counts([arm], of, measure, keep)
        if found is None:
            return None
        estimate = ratio(found.hits[0], found.tries, objects=found.objects)
        return Found(estimate.value, estimate.low, estimate.high, found.seeds, found.items)

    def difference(
        self, first: ArmTest, second: ArmTest, of: str, measure: str = RAW, keep: Keep = every
    ) -> Found | None:
        """Hits per try of `first` minus hits per try of `second`, on the items that `keep` chooses and the seeds with
        both arms. None if no seed has both."""
        return self.mean_difference([(first, second)], of, measure, keep)

    def mean_difference(
        self, pairs: Sequence[tuple[ArmTest, ArmTest]], of: str, measure: str = RAW, keep: Keep = every
    ) -> Found | None:
        """The mean of `difference` over pairs of arms, on the seeds with all arms. The hits of an item are summed over
        the pairs, because its answers from several trainings are not independent. None if no seed has all arms."""
        firsts, seconds = zip(*pairs, strict=True)
        found = self._counts([*firsts, *seconds], of, measure, keep)
        if found is None:
            return None
        first, second = _sum(found.hits[: len(pairs)]), _sum(found.hits[len(pairs) :])
        tries = _sum([found.tries] * len(pairs))
        between = paired(first, second, tries[0] if found.same else tries, objects=found.objects)
        return Found(between.value, between.low, between.high, found.seeds, found.items, between.p)

    def curve(self, arm: str) -> dict[int, ArmTest]:
        """The trainings of an arm by their steps, in increasing order. Empty if the study has no curve."""
        config = self.seeds[0]["config"]
        steps = sorted(config.get("curve", []))
        return {one: (name_of(arm, one, config.get("training", {})), ARMS[arm].tests[0]) for one in steps}

    def _counts(self, arms: Sequence[ArmTest], of: str, measure: str, keep: Keep) -> _Counts | None:
        parts: list[tuple[Any, ...]] = []
        for seed in self.numbers:
            rows = [row for arm in arms if (row := self._table.get((seed, arm, of, measure)))]
            if len(rows) == len(arms) and (kept := keep(rows[0].asked)).any():
                asked = rows[0].asked
                parts.append((seed, asked.items[kept], asked.tries[kept], *(row.hits[kept] for row in rows)))
        if not parts:
            return None
        seeds, items, *counts = zip(*parts, strict=True)
        same = len({(*each, *tries) for each, tries in zip(items, counts[0], strict=True)}) == 1
        tries, *hits = (np.stack(each) if same else list(each) for each in counts)
        objects = objects_of(items[0], YES_NO) if same and of == "relative_size" else None
        return _Counts(seeds, len(items[0]) if same else sum(map(len, items)), same, tries, hits, objects)


class _Counts(NamedTuple):
    """tries and each of hits: (seeds, items) if all seeds have the `same` items, otherwise an array for each seed."""

    seeds: tuple[int, ...]
    items: int
    same: bool
    tries: Any
    hits: list[Any]
    objects: np.ndarray | None


def _sum(counts: Sequence[Any]) -> Any:
    """The sum of arrays, or of lists of arrays array by array."""
    return sum(counts) if isinstance(counts[0], np.ndarray) else [sum(each) for each in zip(*counts, strict=True)]


def read_results(files: Sequence[str | os.PathLike]) -> Results:
    """The results in `files`, one file for each seed.

    Raises:
        ValmError: there are no files, a file is damaged, the recipes differ, or two files belong to one seed.
    """
    if not files:
        raise ValmError("there are no results of a study: run `python -m studies.color run`")
    seeds, rows = [], []
    for file in files:
        found: dict[str, Any] = read_json(Path(file), "the results", SeedJson, "run the study again")
        rows += _rows(found.pop("asked"), found.pop("rows"), found["seed"], file)
        seeds.append(found)
    if len({seed["recipe"] for seed in seeds}) > 1:
        raise ValmError("the results are of different settings, and cannot be pooled")
    if len({seed["seed"] for seed in seeds}) < len(seeds):
        raise ValmError("two of the results are of one seed: give one file for each seed")
    seeds.sort(key=lambda seed: seed["seed"])
    return Results(tuple(seeds), tuple(sorted(rows, key=lambda row: row.seed)))


def _rows(asked: Sequence[AskedJson], rows: Sequence[RowJson], seed: int, file: str | os.PathLike) -> list[Row]:
    known: dict[tuple[str, str], Asked] = {}
    found = {}
    for one in asked:
        known[one["of"], one["measure"]] = Asked(
            items=np.array(one["items"], str),
            tries=np.array(one["tries"], float),
            answers=np.array(one["answers"], str),
            pictured=np.array(one["pictured"], bool),
            pixels=np.array(one["pixels"], str),
        )
    for row in rows:
        arm, of, measure = (row["arm"], row["images"]), row["of"], row["measure"]
        about, hits = known.get((of, measure)), np.array(row["hits"], float)
        if arm_of(arm[0]) is None or arm[1] not in SEEN:
            raise ValmError(f"the results {file} have a row that no study has: {short(arm)}")
        if about is None or not about.is_of(len(hits)) or (arm, of, measure) in found:
            raise ValmError(f"the results {file} are damaged: they lack answers; run the study again")
        found[arm, of, measure] = Row(seed, arm, of, measure, about, hits)
    return [*found.values(), *_pooled(found)]


def _pooled(found: Mapping[tuple[ArmTest, str, str], Row]) -> Iterator[Row]:
    """The rows of PEOPLE. A thing that both sets name, also in the plural, is the first set's."""
    for (arm, of, measure), row in found.items():
        other = found.get((arm, PEOPLE_SETS[1], measure))
        if of == PEOPLE_SETS[0] and other is not None:
            known = {name.rstrip("s") for name in row.asked.items}
            new = np.array([name.rstrip("s") not in known for name in other.asked.items])
            parts = zip(row.asked, other.asked, strict=True)
            asked = Asked(*(np.concatenate([first, second[new]]) for first, second in parts))
            yield row._replace(of=PEOPLE, asked=asked, hits=np.concatenate([row.hits, other.hits[new]]))
