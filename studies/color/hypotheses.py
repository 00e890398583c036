"""The primary hypotheses of the third study in studies/color/plan.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from studies.color.comparisons import BASE, BLIND, CUT, PRIMARY, points, set_title, signed, table
from studies.color.results import CALIBRATED, RAW, ArmTest, Found, Results
from valm.errors import ValmError

# The number of seeds that decide, and the level over the four hypotheses.
SEEDS, LEVEL = 5, 0.05
HYPOTHESES = {
    "T1: query control (Blind), uncalibrated": (BLIND, RAW),
    "T2: base model, uncalibrated": (BASE, RAW),
    "T3: query control (Blind), calibrated": (BLIND, CALIBRATED),
    "T4: base model, calibrated": (BASE, CALIBRATED),
}


class OverSeeds(NamedTuple):
    """A difference by seed, with the 95 % interval of t over the seeds and its p-value."""

    values: tuple[float, ...]
    low: float
    high: float
    p: float


def over_seeds(results: Results, other: ArmTest, measure: str) -> OverSeeds:
    """The accuracy of VaLM with a score threshold minus that of `other`, seed by seed.

    Raises:
        ValmError: SciPy is not installed.
    """
    try:
        from scipy.stats import ttest_1samp  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValmError(f"t intervals need the package scipy ({error}): pip install scipy") from error
    found = [results.of_seeds([seed]).difference(CUT, other, PRIMARY, measure) for seed in results.numbers]
    values = tuple(one.value for one in found if one is not None)
    test = ttest_1samp(values, 0)
    low, high = test.confidence_interval()
    return OverSeeds(values, float(low), float(high), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values after Holm's correction (Holm 1979), in the order of `p_values`."""
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(np.sort(p_values) * np.arange(len(order), 0, -1))
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted.tolist()


def hypotheses(results: Results) -> str:
    """The table of hypotheses with their outcomes. No hypothesis is decided before its seeds have run."""
    some = results.having(*((PRIMARY, arm) for arm in (CUT, BASE, BLIND)))
    if len(some.seeds) < 2:
        return "Fewer than two seeds have the arms of the hypotheses."
    found = [some.difference(CUT, other, PRIMARY, measure) for other, measure in HYPOTHESES.values()]
    seeds = [over_seeds(some, other, measure) for other, measure in HYPOTHESES.values()]
    adjusted = holm([one.p for one in seeds])
    rows = []
    for title, one, by_seed, p in zip(HYPOTHESES, found, seeds, adjusted, strict=True):
        assert one is not None  # as the seeds have both arms
        values = ", ".join(map(signed, by_seed.values))
        interval = f"[{signed(by_seed.low)}, {signed(by_seed.high)}]"
        rows.append(
            [
                title,
                points(one),
                interval,
                values,
                "< 0.001" if p < 0.0005 else f"{p:.3f}",
                _outcome(one, by_seed, p, len(some.seeds)),
            ]
        )
    compared = f"{set_title(PRIMARY)}: VaLM with a score threshold compared with"
    intervals = ["points [95 %, objects and seeds]", "[95 %, t over seeds]"]
    head = [compared, *intervals, "points, seed by seed", "p (Holm)", "hypothesis"]
    return table(head, rows)


def _outcome(found: Found, by_seed: OverSeeds, p: float, seeds: int) -> str:
    holds = p < LEVEL and min(found.low, by_seed.low) > 0
    if seeds < SEEDS:
        return "so far yes" if holds else "so far no"
    return "holds" if holds else "does not hold"
