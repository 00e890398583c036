"""What became of the hypotheses of docs/results/study-plan.md. None is decided before its seeds are there."""

from __future__ import annotations

from collections.abc import Callable

from studies.color.comparisons import (
    CUT,
    NAMES,
    NATURAL,
    PAIRS,
    PRIMARY,
    RANDOM_IMAGES,
    TWIN,
    fewer_seeds,
    harm_ratios,
    points,
    retrieval_tests,
    set_title,
)
from studies.color.config import VALIDATION
from studies.color.questions import CAPTIONS_KIND
from studies.color.results import CALIBRATED, RAW, Results
from valm.evaluation.statistics import Difference

# What the plan calls decisive: five seeds, and ten points.
SEEDS, POINTS = 5, 0.10
# Of the second study: seeds of the arms that not all have; points of S7; the share of a gain of S2; and the ratios of
# perplexities of S3, of which the second is for the upper ends of the intervals.
SOME_SEEDS, KNOWLEDGE_POINTS, KEPT, RATIO, UPPER_RATIO = 3, 0.05, 0.9, 1.0, 1.05


def hypotheses(results: Results) -> str:
    """What became of each hypothesis; nothing is decided before all seeds are there."""
    rows = []

    def add(name: str, difference: Difference, holds: bool, some: Results) -> None:
        decided = len(some.seeds) >= SEEDS
        verdict = ("holds" if holds else "does not hold") if decided else ("so far yes" if holds else "so far no")
        rows.append(f"| {name} | {points(difference)} | {verdict}{fewer_seeds(some, results)} |")

    def difference(pair: str) -> tuple[Difference | None, Results]:
        some = results.having(PRIMARY, *PAIRS[pair])
        return some.difference(*PAIRS[pair], PRIMARY) if some.seeds else None, some

    found, some = difference("VaLM − twin")
    if found:
        add("H1: VaLM − twin, MemoryColor, raw", found, found.value >= POINTS and found.low > 0, some)
    found, some = difference(RANDOM_IMAGES)
    if found:
        add("H2: the same with random images at test time", found, found.low <= 0, some)
    tests = retrieval_tests(results)
    if tests:
        best = max(tests, key=lambda test: test.difference.low)
        name = f"H3: the clearest of {len(tests)} tests of retrieval: {best.title}"
        add(name, best.difference, best.difference.low > 0, best.results)
    found, some = difference("VaLM − Blind")
    if found:
        add("H4: VaLM − Blind, MemoryColor, raw", found, found.low > 0 or found.high < 0, some)
    found, some = difference(NATURAL)
    if found:
        add("H5: natural VaLM − natural twin, MemoryColor, raw", found, found.low > 0, some)
    return "\n".join(["| Hypothesis | Points [95 %] | |", "| --- | --- | --- |", *rows])


def claims(results: Results) -> str:
    """What became of the hypotheses of the second study (docs/results/study-plan.md). None is decided before its seeds
    are there."""
    lines = ["| Hypothesis | Found [95 %] | |", "| --- | --- | --- |"]

    def add(
        name: str, seeds: int, holds: Callable[..., bool], *asked: tuple[str, str, str], among: Results = results
    ) -> None:
        """A row about differences (pair, set, kind), if there are seeds that have all."""
        some = among
        for pair, of, _ in asked:
            some = some.having(of, *PAIRS[pair])
        if some.seeds:
            found = [some.difference(*PAIRS[pair], of, kind) for pair, of, kind in asked]
            what = "; ".join(f"{set_title(one[1])} {points(each)}" for one, each in zip(asked, found, strict=True))
            row(name, what, holds(*found), some, seeds)

    def row(name: str, what: str, holds: bool, some: Results, seeds: int) -> None:
        decided = len(some.seeds) >= seeds
        verdict = ("holds" if holds else "does not hold") if decided else ("so far yes" if holds else "so far no")
        lines.append(f"| {name} | {what}{fewer_seeds(some, results)} | {verdict} |")

    def two(pair: str) -> list[tuple[str, str, str]]:
        return [(pair, VALIDATION, RAW), (pair, PRIMARY, RAW)]

    def better(things: Difference, items: Difference) -> bool:
        return min(things.low, items.low) > 0 and items.value >= POINTS

    cut = "VaLM with the cut − twin"
    add("S1: VaLM − twin", SEEDS, better, *two("VaLM − twin"))
    add(
        f"S2: {cut}, and at least {KEPT:.0%} of VaLM's on validation things",
        SEEDS,
        lambda things, items, whole: better(things, items) and things.value >= KEPT * whole.value,
        *two(cut),
        ("VaLM − twin", VALIDATION, RAW),
    )
    harmless = harm_ratios(results, CUT)
    if harmless:
        ratios = [ratio for ratio in harmless if ratio.over == TWIN or ratio.text != CAPTIONS_KIND]
        holds = all(ratio.value <= RATIO and ratio.high <= UPPER_RATIO for ratio in ratios)
        what = "; ".join(f"{ratio.text} × the {NAMES[ratio.over[0]]}'s {ratio}" for ratio in ratios)
        complete = {(ratio.text, ratio.over) for ratio in harmless} >= {(CAPTIONS_KIND, TWIN)}
        row("S3: perplexity of VaLM with the cut", what, holds and complete, harmless[0].results, SEEDS)
    add(
        "S4: VaLM with the cut, random images − twin, calibrated",
        SEEDS,
        lambda found: found.high >= 0,
        ("VaLM with the cut, random images − twin", PRIMARY, CALIBRATED),
    )
    add("S5: VaLM − captions in context", SEEDS, _above, ("VaLM − captions in context", VALIDATION, RAW))
    add("S6: VaLM − late fusion", SOME_SEEDS, _differs, ("VaLM − late fusion", VALIDATION, RAW))
    # the colourless CLIP can know black: see the plan
    for which, among in (("", results), (", without black things", results.without("black"))):
        add(
            f"S7: colourless VaLM − colourless Blind{which}",
            SOME_SEEDS,
            lambda things, items: (
                min(things.low, items.low) > 0 and things.value >= POINTS and items.value >= KNOWLEDGE_POINTS
            ),
            *two("colourless VaLM − colourless Blind"),
            among=among,
        )
        add(
            f"S8: colourless Blind − twin{which}",
            SOME_SEEDS,
            lambda found: found.low <= 0,
            ("colourless Blind − twin", VALIDATION, RAW),
            among=among,
        )
    add("S9: natural VaLM − natural twin", SOME_SEEDS, _above, (NATURAL, VALIDATION, RAW))
    return "\n".join(lines)


def _above(found: Difference) -> bool:
    return found.low > 0


def _differs(found: Difference) -> bool:
    return found.low > 0 or found.high < 0
