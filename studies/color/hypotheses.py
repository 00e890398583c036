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
    "T1: VaLM with the cut − Blind, raw": (BLIND, RAW),
    "T2: VaLM with the cut − base, raw": (BASE, RAW),
    "T3: VaLM with the cut − Blind, calibrated": (BLIND, CALIBRATED),
    "T4: VaLM with the cut − base, calibrated": (BASE, CALIBRATED),
}


class OverSeeds(NamedTuple):
    """A difference by seed, with the 95 % interval of t over the seeds and its p-value."""

    values: tuple[float, ...]
    low: float
    high: float
    p: float


def over_seeds(results: Results, other: ArmTest, measure: str) -> OverSeeds:
    """VaLM with the cut − `other`, seed by seed.

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
        rows.append([title, points(one), interval, values, f"{p:.3f}", _outcome(one, by_seed, p, len(some.seeds))])
    head = [f"{set_title(PRIMARY)}, points", "[95 %], items and seeds", "t over seeds", "by seed", "p, Holm", ""]
    return table(head, rows)


def _outcome(found: Found, by_seed: OverSeeds, p: float, seeds: int) -> str:
    holds = p < LEVEL and min(found.low, by_seed.low) > 0
    if seeds < SEEDS:
        return "so far yes" if holds else "so far no"
    return "holds" if holds else "does not hold"
