"""The three claims of the fifth study (studies/color/plan.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from studies.color.comparisons import (
    ALL_OF_PEOPLE,
    BASE,
    CONTROL,
    EXCHANGE_TITLES,
    MEASURES,
    VALIDATION_OBJECTS,
    VALM,
    Items,
    follows,
    learned,
    points,
    signed,
    table,
)
from studies.color.results import APART, PEOPLE, RAW, Found, Results, pictured
from valm.errors import ValmError

# The number of seeds that decide, and the level over all claims.
SEEDS, LEVEL = 5, 0.05
Difference = Callable[[Results], Found | None]


def _over_the_base(results: Results, measure: str) -> Found | None:
    return results.difference(VALM, BASE, PEOPLE, measure, pictured)


# The parts of each claim. A claim holds only if all its parts lie above 0.
CLAIMS: dict[str, dict[str, Difference]] = {
    f"(a) VaLM minus base model, {ALL_OF_PEOPLE.title}, objects with a picture": {
        MEASURES[measure]: partial(_over_the_base, measure=measure) for measure in (RAW, APART)
    },
    "(b) learned from less: VaLM minus query control, mean over the numbers of steps": {
        items.title: partial(learned, items=items) for items in (VALIDATION_OBJECTS, ALL_OF_PEOPLE)
    },
    f"(c) exchange: VaLM answers the new colour, minus before, {ALL_OF_PEOPLE.title}": {
        title: partial(follows, items=ALL_OF_PEOPLE, exchange=exchange) for exchange, title in EXCHANGE_TITLES.items()
    },
}


def _longest(results: Results, items: Items) -> Found | None:
    """VaLM minus the query control, uncalibrated, after the most steps of the curve."""
    valm, control = results.curve(VALM[0]), results.curve(CONTROL[0])
    return results.difference(valm[max(valm)], control[max(control)], items.of)


class Part(NamedTuple):
    """A part of a claim: a difference over all seeds, its value in each seed, and the 95 % interval of t over the
    seeds with its two-sided p-value."""

    title: str
    found: Found
    values: tuple[float, ...]
    low: float
    high: float
    p: float

    @property
    def above(self) -> bool:
        """Whether both intervals lie above 0."""
        return min(self.found.low, self.low) > 0


def part_of(title: str, difference: Difference, results: Results) -> Part:
    """A difference in results whose seeds all have it.

    Raises:
        ValmError: SciPy is not installed.
    """
    try:
        from scipy.stats import ttest_1samp  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValmError(f"t intervals need the package scipy ({error}): pip install scipy") from error
    whole = difference(results)
    alone = [difference(results.of_seeds([seed])) for seed in results.numbers]
    assert whole is not None
    values = tuple(one.value for one in alone if one is not None)
    test = ttest_1samp(values, 0)
    low, high = test.confidence_interval()
    p = float(test.pvalue) if any(values) else 1.0  # NaN if all values are 0
    return Part(title, whole, values, float(low), float(high), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values after Holm's correction (Holm 1979), in the order of `p_values`."""
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(np.sort(p_values) * np.arange(len(order), 0, -1))
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted.tolist()


def claims(results: Results) -> str:
    """The table of claims with their outcomes: a row for each part. The p-value of a claim is the largest of its parts,
    and Holm's correction is over the claims. No claim is decided before its seeds have run."""
    differences = [difference for parts in CLAIMS.values() for difference in parts.values()]
    alone = {seed: results.of_seeds([seed]) for seed in results.numbers}
    some = results.of_seeds([seed for seed, one in alone.items() if all(each(one) for each in differences)])
    if len(some.seeds) < 2:
        return "Fewer than two seeds have the models of the claims."
    found = {
        claim: [part_of(title, difference, some) for title, difference in parts.items()]
        for claim, parts in CLAIMS.items()
    }
    adjusted = holm([max(part.p for part in parts) for parts in found.values()])
    rows = []
    for (claim, parts), p in zip(found.items(), adjusted, strict=True):
        outcome = _outcome(p < LEVEL and all(part.above for part in parts), len(some.seeds))
        for part in parts:
            rows.append([f"{claim}, {part.title}", *_numbers(part), _p_value(p), outcome])
    # what the plan asks before the page may say that images say more than their query
    for items in (VALIDATION_OBJECTS, ALL_OF_PEOPLE):
        title = f"no claim: VaLM minus query control after {max(some.curve(VALM[0]))} steps, {items.title}"
        part = part_of(title, partial(_longest, items=items), some)
        rows.append([title, *_numbers(part), "–", "both above 0" if part.above else "not both above 0"])
    intervals = ["points [95 %, objects and seeds]", "[95 %, t over seeds]"]
    return table(["Claim", *intervals, "points, seed by seed", "p", "p of the claim (Holm)", "claim"], rows)


def _numbers(part: Part) -> list[str]:
    interval = f"[{signed(part.low)}, {signed(part.high)}]"
    return [points(part.found), interval, ", ".join(map(signed, part.values)), _p_value(part.p)]


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def _outcome(holds: bool, seeds: int) -> str:
    if seeds < SEEDS:
        return "so far yes" if holds else "so far no"
    return "holds" if holds else "does not hold"
