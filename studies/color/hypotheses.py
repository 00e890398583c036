"""What became of the hypotheses of the second study in studies/color/plan.md."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from studies.color.comparisons import (
    BASE,
    CUT,
    NATURAL,
    PAIRS,
    PRIMARY,
    TWIN,
    fewer_seeds,
    perplexity_ratio,
    points,
    set_title,
    table,
    times,
)
from studies.color.config import ARMS, VALIDATION
from studies.color.questions import CAPTIONS_KIND
from studies.color.results import CALIBRATED, RAW, Asked, Found, Keep, Results, every

# What the plan calls decisive: five seeds, or three of the arms that not all seeds have, and ten points; points of S7;
# the share of a gain of S2; and the ratios of perplexities of S3, of which the second is for the upper ends of the
# intervals.
SEEDS, SOME_SEEDS, POINTS = 5, 3, 0.10
KNOWLEDGE_POINTS, KEPT, RATIO, UPPER_RATIO = 0.05, 0.9, 1.0, 1.05


def claims(results: Results) -> str:
    """What became of each hypothesis. None is decided before its seeds are there."""
    rows: list[tuple[str, str, str]] = []

    def add(
        name: str, seeds: int, holds: Callable[..., bool], *asked: tuple[str, str, str], keep: Keep = every
    ) -> None:
        """A row about differences (pair, set, measure), of the seeds that have all."""
        some = results.having(*((of, arm) for pair, of, _ in asked for arm in PAIRS[pair]))
        all_found = [some.difference(*PAIRS[pair], of, measure, keep) for pair, of, measure in asked]
        found = [one for one in all_found if one is not None]
        if len(found) == len(asked):
            what = "; ".join(f"{set_title(of)} {points(one)}" for (_, of, _), one in zip(asked, found, strict=True))
            row(name, what, holds(*found), found[0], seeds)

    def row(name: str, what: str, holds: bool, found: Found, seeds: int) -> None:
        decided = len(found.seeds) >= seeds
        verdict = ("holds" if holds else "does not hold") if decided else ("so far yes" if holds else "so far no")
        rows.append((name, what + fewer_seeds(found, results), verdict))

    def two(pair: str) -> list[tuple[str, str, str]]:
        return [(pair, VALIDATION, RAW), (pair, PRIMARY, RAW)]

    def better(things: Found, items: Found) -> bool:
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
    asked = [(text, over) for text in results.texts() for over in (BASE, TWIN)]
    asked = [(text, over) for text, over in asked if over == TWIN or text != CAPTIONS_KIND]
    ratios = {one: found for one in asked if (found := perplexity_ratio(results, CUT, one[1], one[0]))}
    if ratios:
        what = "; ".join(f"{text} × the {ARMS[over[0]].title}'s {times(one)}" for (text, over), one in ratios.items())
        holds = all(one.value <= RATIO and one.high <= UPPER_RATIO for one in ratios.values())
        holds &= (CAPTIONS_KIND, TWIN) in ratios
        row("S3: perplexity of VaLM with the cut", what, holds, next(iter(ratios.values())), SEEDS)
    add(
        "S4: VaLM with the cut, random images − twin, calibrated",
        SEEDS,
        lambda found: found.high >= 0,
        ("VaLM with the cut, random images − twin", PRIMARY, CALIBRATED),
    )
    add("S5: VaLM − captions in context", SEEDS, _above, ("VaLM − captions in context", VALIDATION, RAW))
    add(
        "S6: VaLM − late fusion",
        SOME_SEEDS,
        lambda found: found.low > 0 or found.high < 0,
        ("VaLM − late fusion", VALIDATION, RAW),
    )
    # the colourless CLIP can know black: see the plan
    some: list[tuple[str, Keep]] = [("", every), (", without black things", _not_black)]
    for which, keep in some:
        add(
            f"S7: colourless VaLM − colourless Blind{which}",
            SOME_SEEDS,
            lambda things, items: (
                min(things.low, items.low) > 0 and things.value >= POINTS and items.value >= KNOWLEDGE_POINTS
            ),
            *two("colourless VaLM − colourless Blind"),
            keep=keep,
        )
        add(
            f"S8: colourless Blind − twin{which}",
            SOME_SEEDS,
            lambda found: found.low <= 0,
            ("colourless Blind − twin", VALIDATION, RAW),
            keep=keep,
        )
    add("S9: natural VaLM − natural twin", SOME_SEEDS, _above, (NATURAL, VALIDATION, RAW))
    return table(("Hypothesis", "Found [95 %]", ""), rows)


def _above(found: Found) -> bool:
    return found.low > 0


def _not_black(asked: Asked) -> np.ndarray:
    return asked.answers != "black"
