"""Reads the results of seeds: which answers were right, and differences between arms with their intervals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from studies.color.config import ARMS, SETS, VALIDATION
from studies.color.scoring import DIGITS, expanded
from valm.errors import ValmError
from valm.evaluation.questions import objects_of
from valm.evaluation.statistics import Counts, Difference, Estimate, paired, ratio
from valm.store.files import Count, read_json
from valm_kernels.json_files import short

RAW, CALIBRATED = "raw", "calibrated"
# A CLIP trained again on another machine may answer one or two questions otherwise.
CLIP_TOLERANCE = 0.02
# What the tokens of a row saw.
SEEN = {images for arm in ARMS.values() for images in arm.tests}
_Answers = list[Annotated[str, Field(pattern=f"^[{DIGITS}]+$")]]  # see `scoring.compact`
_Number = Annotated[float, Field(ge=0)]


# Of the pictures of an item, by what is done to the images.
_Colors = TypedDict("_Colors", {"retrieved": str | None, "exchanged": str | None, "other-colors": str | None})


class _ColorsAbout(TypedDict, total=False):
    """Per item of a set about colours: whether it has a picture, and, for all but the large set, of what colour."""

    pictured: list[bool]
    colors: list[_Colors]


class _About(_ColorsAbout):
    """What was asked about the items of a set."""

    items: list[str]
    candidates: list[str]
    right: _Answers


class _Answered(TypedDict, total=False):
    """Of a set, its name and the answers; of a text, its name and one number per document."""

    set: str
    raw: _Answers
    calibrated: _Answers
    text: str
    nats: list[_Number]
    tokens: list[Annotated[int, Field(ge=1)]]


class _Row(_Answered):
    arm: str
    images: str


class _SecondStudy(TypedDict, total=False):
    """What results of the first study do not have: what could not be asked, and of each trained model its numbers."""

    missing: list[str]
    training: dict[str, dict[str, float]]


class _SeedResults(_SecondStudy):
    study: str
    recipe: str
    seed: Count
    sets: dict[str, _About]
    rows: list[_Row]
    losses: dict[str, list[_Number]]
    clip: dict[str, Any]
    counts: dict[str, Count]
    versions: dict[str, str]
    hardware: str
    threads: Count
    seconds: dict[str, _Number]


@dataclass(frozen=True)
class Results:
    """The results of several seeds of one recipe.

    Some seeds may have fewer arms or tests than others. A number is asked of seeds that all have it: see `having`.

    Args:
        seeds: the contents of the results files, those of a seed together.
    """

    seeds: tuple[dict[str, Any], ...]

    def arms(self) -> list[tuple[str, str]]:
        """(arm, images) of every row, in their order."""
        return list(dict.fromkeys((row["arm"], row["images"]) for seed in self.seeds for row in seed["rows"]))

    def sets(self) -> list[str]:
        return list(dict.fromkeys(name for seed in self.seeds for name in seed["sets"]))

    def texts(self) -> list[str]:
        return list(dict.fromkeys(row["text"] for seed in self.seeds for row in seed["rows"] if "text" in row))

    def having(self, of: str, *asked: tuple[str, str]) -> Results:
        """The seeds in which each of `asked` (arm, images) was asked about the set or text `of`."""
        return Results(tuple(seed for seed in self.seeds if all(_row(seed, *one, of) for one in asked)))

    def without(self, answer: str) -> Results:
        """The same without the items to which `answer` is right."""
        return Results(tuple(_without(seed, answer) for seed in self.seeds))

    def hits(self, arm: str, images: str, of: str, kind: str = RAW) -> Counts:
        """The number of right answers per item.

        Raises:
            ValmError: a seed has no such row.
        """
        rows = []
        for seed in self.seeds:
            answers = expanded(_needed(seed, arm, images, of)[kind])
            rows.append((answers == expanded(seed["sets"][of]["right"])).sum(-1).astype(float))
        return _stacked(rows, self._same_items(of))

    def accuracy(self, arm: str, images: str, of: str, kind: str = RAW) -> Estimate:
        found = self.hits(arm, images, of, kind)
        return ratio(found, self._tries(found, of), objects=self._objects(of))

    def difference(
        self,
        first: tuple[str, str],
        second: tuple[str, str],
        of: str,
        kind: str = RAW,
        pictured: bool | None = None,
    ) -> Difference:
        """The accuracy of `first` (arm, images) minus that of `second`, on all items, or on those with (`pictured`) or
        without a picture in the knowledge base."""
        hits, others = self.hits(*first, of, kind), self.hits(*second, of, kind)
        if pictured is not None:
            items = [np.array(seed["sets"][of]["pictured"]) == pictured for seed in self.seeds]
            hits, others = _of(items, hits), _of(items, others)
        return self._paired(hits, others, of)

    def pictured(self, of: str) -> np.ndarray:
        """Whether each item has a picture in the knowledge base; seed after seed where their items differ."""
        rows = [np.array(seed["sets"][of]["pictured"]) for seed in self.seeds]
        return rows[0] if self._same_items(of) else np.concatenate(rows)

    def missing(self) -> dict[str, list[int]]:
        """What could not be asked, with the seeds."""
        found: dict[str, list[int]] = {}
        for seed in self.seeds:
            for name in seed.get("missing", ()):
                found.setdefault(name, []).append(seed["seed"])
        return found

    def prompts(self, of: str) -> int:
        return len(self.seeds[0]["sets"][of]["right"][0])

    def changes(self, exchange: str, of: str) -> bool:
        """Whether a picture of an item has another colour in `exchange`."""
        return any(_changed(seed["sets"][of], exchange) for seed in self.seeds)

    def follows(self, arm: str, exchange: str, of: str) -> tuple[Difference, int]:
        """How much more often the exchanged colour is answered with the exchanged images than with the original ones.

        Returns:
            The difference, and the number of items whose colour is exchanged.

        Raises:
            ValmError: there are none.
        """
        chosen = [_changed(seed["sets"][of], exchange) for seed in self.seeds]
        if not any(chosen):
            raise ValmError(f"no item of {of} has a picture whose colour is another in {exchange!r}")

        def now(images: str) -> Counts:
            rows = []
            for seed, items in zip(self.seeds, chosen, strict=True):
                about = seed["sets"][of]
                answers = expanded(_needed(seed, arm, images, of)[RAW])
                wanted = [about["candidates"].index(about["colors"][item][exchange]) for item in items]
                rows.append((answers[items] == np.array(wanted)[:, None]).sum(-1).astype(float))
            return _stacked(rows, self._same_items(of) and len({tuple(items) for items in chosen}) == 1)

        after, before = now(exchange), now("retrieved")
        count = after.shape[1] if isinstance(after, np.ndarray) else sum(map(len, after))
        return self._paired(after, before, of), count

    def added(self, arm: str, of: str) -> tuple[Difference, int]:
        """The gain in accuracy from having the items' pictures in the knowledge base.

        Returns:
            The difference on the items that have a picture, and their number.
        """
        items = [np.flatnonzero(seed["sets"][of]["pictured"]) for seed in self.seeds]
        with_them, without = (_of(items, self.hits(arm, images, of)) for images in ("retrieved", "taken-out"))
        count = with_them.shape[1] if isinstance(with_them, np.ndarray) else sum(map(len, with_them))
        return self._paired(with_them, without, of), count

    def perplexity(self, arm: str, images: str, text: str) -> Estimate:
        nats, tokens = self._text(arm, images, text)
        return ratio(nats, tokens, transform=np.exp)

    def nats_difference(self, first: tuple[str, str], second: tuple[str, str], text: str) -> Difference:
        """The difference in nats per token; above 0, `first` predicts the text worse."""
        nats, tokens = self._text(*first, text)
        return paired(nats, self._text(*second, text)[0], tokens[0] if isinstance(tokens, np.ndarray) else tokens)

    def _text(self, arm: str, images: str, text: str) -> tuple[Counts, Counts]:
        rows = [_needed(seed, arm, images, text) for seed in self.seeds]
        same = len({tuple(row["tokens"]) for row in rows}) == 1
        nats, tokens = ([np.array(row[name], float) for row in rows] for name in ("nats", "tokens"))
        return _stacked(nats, same), _stacked(tokens, same)

    def _tries(self, hits: Counts, of: str) -> Counts:
        prompts = float(self.prompts(of))
        if isinstance(hits, np.ndarray):
            return np.full(hits.shape, prompts)
        return [np.full(len(one), prompts) for one in hits]

    def _paired(self, first: Counts, second: Counts, of: str) -> Difference:
        tries = self._tries(first, of)
        same = isinstance(tries, np.ndarray)
        return paired(first, second, tries[0] if same else tries, objects=self._objects(of) if same else None)

    def _objects(self, of: str) -> np.ndarray | None:
        about = self.seeds[0]["sets"][of]
        return objects_of(about["items"], about["candidates"])

    def _same_items(self, of: str) -> bool:
        return len({tuple(seed["sets"][of]["items"]) for seed in self.seeds}) == 1


def read_results(files: Sequence[str | os.PathLike]) -> Results:
    """The results in `files`, by their seeds. Two files may hold different arms or tests of one seed.

    Raises:
        ValmError: there are none, one is damaged, their recipes differ, or two files of a seed have the same row or
            differ in what was asked or in their CLIP.
    """
    if not files:
        raise ValmError("there are no results of a study: run `python -m studies.color run`")
    read = [_read(Path(file)) for file in files]
    if len({result["recipe"] for result in read}) > 1:
        raise ValmError("the results are of different settings, and cannot be pooled")
    seeds: dict[int, dict[str, Any]] = {}
    # the twin's first: what two files of a seed tell of its CLIP and machine is taken from there
    for result in sorted(read, key=lambda result: (result["seed"], "twin" not in result["losses"])):
        seed = result["seed"]
        seeds[seed] = _together(seeds[seed], result) if seed in seeds else result
    return Results(tuple(seeds.values()))


def _read(file: Path) -> dict[str, Any]:
    found = read_json(file, "the results", _SeedResults, "run the study again")
    damaged = ValmError(f"the results {file} are damaged: they lack answers; run the study again")
    prompts = {}
    for name, about in found["sets"].items():
        count = len(about["items"])
        prompts[name] = len(about["right"][0]) if about["right"] else 0
        parts = ("pictured", "colors") if name in (VALIDATION, *SETS[:2]) else ()
        if not all(count == len(about.get(part, ())) > 0 for part in ("items", *parts)):
            raise damaged
        if not _fit(about["right"], about, prompts[name]):
            raise damaged
    for row in found["rows"]:
        if row["arm"] not in ARMS or row["images"] not in SEEN:
            unknown = f"{short(row['arm'])}, {short(row['images'])}"
            raise ValmError(f"the results {file} have a row that no study has: {unknown}")
        if "text" in row:
            whole = len(row.get("nats", ())) == len(row.get("tokens", ())) > 0
        else:
            about = found["sets"].get(row.get("set"))
            # as `answers_of` calibrates
            one_right = about is not None and all(len(set(right)) == 1 for right in about["right"])
            kinds = {RAW, CALIBRATED} if one_right else {RAW}
            answers = [row[kind] for kind in (RAW, CALIBRATED) if kind in row]
            whole = about is not None and kinds <= row.keys()
            whole = whole and all(_fit(one, about, prompts[row["set"]]) for one in answers)
        if not whole:
            raise damaged
    return found


def _fit(answers: Sequence[str], about: _About, prompts: int) -> bool:
    """Whether there is a candidate for every item and prompt."""
    known = DIGITS[: len(about["candidates"])]
    return len(answers) == len(about["items"]) and all(
        len(row) == prompts and set(row) <= set(known) for row in answers
    )


def _together(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two results of one seed as one. What both tell of the text and the machine is the first's."""
    seed = first["seed"]
    rows = {(row["arm"], row["images"], row.get("set", row.get("text"))) for row in first["rows"]}
    for row in second["rows"]:
        arm, images, of = row["arm"], row["images"], row.get("set", row.get("text"))
        if (arm, images, of) in rows:
            raise ValmError(f"two of the results of seed {seed} have a row of {arm}, {images}, {of}")
    for name in first["sets"].keys() & second["sets"].keys():
        parts = ("items", "candidates", "right", "pictured", "colors")
        if any(first["sets"][name].get(part) != second["sets"][name].get(part) for part in parts):
            raise ValmError(f"two of the results of seed {seed} asked different questions of {name}")
    tokens = {row["text"]: row["tokens"] for row in first["rows"] if "text" in row}
    for row in second["rows"]:
        if "text" in row and row["tokens"] != tokens.get(row["text"], row["tokens"]):
            raise ValmError(f"two of the results of seed {seed} read different texts as {row['text']}")
    for title in first["clip"].keys() & second["clip"].keys():
        if not _alike(first["clip"][title], second["clip"][title]):
            raise ValmError(f"two of the results of seed {seed} are of different CLIPs: see {short(title)}")
    missing = [name for part in (first, second) for name in part.get("missing", ())]
    return first | {
        "rows": first["rows"] + second["rows"],
        **{part: second[part] | first[part] for part in ("sets", "losses", "clip", "seconds")},
        "missing": list(dict.fromkeys(missing)),
        "training": second.get("training", {}) | first.get("training", {}),
    }


def _alike(first: Any, second: Any) -> bool:
    """Whether two measurements can be of one CLIP, trained once on each of two machines."""
    if isinstance(first, int | float) and isinstance(second, int | float):
        return abs(first - second) <= CLIP_TOLERANCE
    return first == second


def _row(seed: dict[str, Any], arm: str, images: str, of: str) -> dict[str, Any] | None:
    return next(
        (
            row
            for row in seed["rows"]
            if row["arm"] == arm and row["images"] == images and of in (row.get("set"), row.get("text"))
        ),
        None,
    )


def _without(seed: dict[str, Any], answer: str) -> dict[str, Any]:
    """A seed without the items to which `answer` is right."""
    kept: dict[str, list[int]] = {}
    for name, about in seed["sets"].items():
        right = expanded(about["right"])
        place = about["candidates"].index(answer) if answer in about["candidates"] else -1
        kept[name] = [number for number, one in enumerate(right) if place not in one]

    def chosen(found: dict[str, Any], name: str) -> dict[str, Any]:
        parts = {"items", "right", "pictured", "colors", RAW, CALIBRATED} & found.keys()
        return found | {part: [found[part][number] for number in kept[name]] for part in parts}

    return seed | {
        "sets": {name: chosen(about, name) for name, about in seed["sets"].items()},
        "rows": [chosen(row, row["set"]) if "set" in row else row for row in seed["rows"]],
    }


def _needed(seed: dict[str, Any], arm: str, images: str, of: str) -> dict[str, Any]:
    found = _row(seed, arm, images, of)
    if found is None:
        raise ValmError(f"the results of seed {seed['seed']} have no row of {arm}, {images}, {of}")
    return found


def _changed(about: dict[str, Any], exchange: str) -> list[int]:
    """The items whose pictures get another colour by `exchange` that is among the candidates."""
    return [
        number
        for number, colors in enumerate(about["colors"])
        if None not in (colors["retrieved"], colors[exchange])
        and colors["retrieved"] != colors[exchange]
        and colors[exchange] in about["candidates"]
    ]


def _stacked(rows: Sequence[np.ndarray], same: bool) -> Counts:
    """Of the seeds that have any item."""
    return np.stack(rows) if same else [row for row in rows if len(row)]


def _of(items: Sequence[np.ndarray], counts: Counts) -> Counts:
    """The counts of the items that are chosen in each seed, the same in all that have the same items."""
    if isinstance(counts, np.ndarray):
        return counts[:, items[0]]
    return _stacked([one[chosen] for one, chosen in zip(counts, items, strict=True)], same=False)
