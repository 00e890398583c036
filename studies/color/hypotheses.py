"""The primary hypotheses of the third and the fourth study in studies/color/plan.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from studies.color.comparisons import (
    BASE,
    BLIND,
    CUT,
    PRIMARY,
    READING,
    READING_BLIND,
    READING_BLIND_ALL,
    arm_title,
    points,
    set_title,
    signed,
    studied,
    table,
)
from studies.color.config import VALIDATION
from studies.color.results import CALIBRATED, PEOPLE, RAW, ArmTest, Found, Results
from valm.errors import ValmError

# The number of seeds that decide, and the level over all hypotheses of a study.
SEEDS, LEVEL = 5, 0.05


class Hypothesis(NamedTuple):
    """The studied arm is more often correct on the set `of` than the best of `others` on validation objects is."""

    title: str
    others: tuple[ArmTest, ...]
    measure: str
    of: str


CONTROLS = {CUT: (BLIND,), READING: (READING_BLIND, READING_BLIND_ALL)}  # the query controls of a study
HYPOTHESES = {
    CUT: (
        Hypothesis("T1: query control (Blind), uncalibrated", CONTROLS[CUT], RAW, PRIMARY),
        Hypothesis("T2: base model, uncalibrated", (BASE,), RAW, PRIMARY),
        Hypothesis("T3: query control (Blind), calibrated", CONTROLS[CUT], CALIBRATED, PRIMARY),
        Hypothesis("T4: base model, calibrated", (BASE,), CALIBRATED, PRIMARY),
    ),
    READING: (
        Hypothesis("F1: query control, uncalibrated", CONTROLS[READING], RAW, PEOPLE),
        Hypothesis("F2: query control, calibrated", CONTROLS[READING], CALIBRATED, PEOPLE),
        Hypothesis("F3: VaLM with the old training, uncalibrated", (CUT,), RAW, PEOPLE),
        Hypothesis("F4: VaLM with the old training, calibrated", (CUT,), CALIBRATED, PEOPLE),
        Hypothesis("F5: base model, calibrated", (BASE,), CALIBRATED, PEOPLE),
    ),
}


class OverSeeds(NamedTuple):
    """A difference by seed, with the 95 % interval of t over the seeds and its p-value."""

    values: tuple[float, ...]
    low: float
    high: float
    p: float


def over_seeds(results: Results, other: ArmTest, of: str, measure: str) -> OverSeeds:
    """The accuracy of the studied arm minus that of `other`, seed by seed.

    Raises:
        ValmError: SciPy is not installed.
    """
    try:
        from scipy.stats import ttest_1samp  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValmError(f"t intervals need the package scipy ({error}): pip install scipy") from error
    arm = studied(results)
    found = [results.of_seeds([seed]).difference(arm, other, of, measure) for seed in results.numbers]
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
    arm = studied(results)
    planned = HYPOTHESES[arm]
    some = results.having(*((one.of, each) for one in planned for each in (arm, *one.others)))
    if len(some.seeds) < 2:
        return "Fewer than two seeds have the arms of the hypotheses."
    others = [best(some, one.others) for one in planned]
    found = [some.difference(arm, other, one.of, one.measure) for one, other in zip(planned, others, strict=True)]
    seeds = [over_seeds(some, other, one.of, one.measure) for one, other in zip(planned, others, strict=True)]
    adjusted = holm([one.p for one in seeds])
    rows = []
    for one, other, difference, by_seed, p in zip(planned, others, found, seeds, adjusted, strict=True):
        assert difference is not None  # as the seeds have both arms
        values = ", ".join(map(signed, by_seed.values))
        interval = f"[{signed(by_seed.low)}, {signed(by_seed.high)}]"
        outcome = _outcome(difference, by_seed, p, len(some.seeds))
        title = one.title if len(one.others) == 1 else f"{one.title} ({arm_title(other)})"
        rows.append([title, points(difference), interval, values, "< 0.001" if p < 0.0005 else f"{p:.3f}", outcome])
    compared = f"{set_title(planned[0].of)}: {arm_title(arm)} compared with"
    intervals = ["points [95 %, objects and seeds]", "[95 %, t over seeds]"]
    head = [compared, *intervals, "points, seed by seed", "p (Holm)", "hypothesis"]
    return table(head, rows)


def best(results: Results, arms: Sequence[ArmTest]) -> ArmTest:
    """The arm that is most often correct on validation objects, uncalibrated."""

    def accuracy(arm: ArmTest) -> float:
        found = results.accuracy(arm, VALIDATION)
        return 0.0 if found is None else found.value

    return max(arms, key=accuracy)


def _outcome(found: Found, by_seed: OverSeeds, p: float, seeds: int) -> str:
    holds = p < LEVEL and min(found.low, by_seed.low) > 0
    if seeds < SEEDS:
        return "so far yes" if holds else "so far no"
    return "holds" if holds else "does not hold"
