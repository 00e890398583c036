"""The figures of docs/results/study.md and of the README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from studies.color.comparisons import (
    MEASURES,
    NAMES,
    NATURAL,
    PAIRS,
    PRIMARY,
    RANDOM_IMAGES,
    SECONDARY,
    fewer_seeds,
    retrieval_tests,
    set_title,
)
from studies.color.config import VALIDATION
from studies.color.results import Results
from studies.plots import FAINT, INK, SERIES, new_figure, quiet
from valm.evaluation.statistics import Difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Steps of the learning curves that are averaged.
WINDOW = 20


def forest(results: Results) -> Figure:
    """The differences of the plan with their intervals, in points."""
    rows = []
    for name, (first, second) in PAIRS.items():
        for of, kind in MEASURES[:6]:
            some = results.having(of, first, second)
            if some.seeds:
                title = f"{name}: {set_title(of)}, {kind}{fewer_seeds(some, results)}"
                rows.append((title, some.difference(first, second, of, kind)))
    rows += [(test.title + fewer_seeds(test.results, results), test.difference) for test in retrieval_tests(results)]
    return _intervals(rows, 9)


def overview(results: Results) -> Figure:
    """A few of the differences of `forest`, for the README."""
    asked = [("colours that no text says, VaLM − twin", "VaLM − twin", VALIDATION)]
    asked += [(f"{set_title(of)}, VaLM − twin", "VaLM − twin", of) for of in (PRIMARY, *SECONDARY)]
    asked += [(f"{set_title(PRIMARY)}, {name}", name, PRIMARY) for name in (RANDOM_IMAGES, "VaLM − Blind", NATURAL)]
    rows = []
    for title, name, of in asked:
        some = results.having(of, *PAIRS[name])
        if some.seeds:
            rows.append((title + fewer_seeds(some, results), some.difference(*PAIRS[name], of)))
    tests = [test for test in retrieval_tests(results) if (test.arm, test.of) == ("valm", PRIMARY)]
    return _intervals(rows + [(test.title + fewer_seeds(test.results, results), test.difference) for test in tests], 6)


def _intervals(rows: Sequence[tuple[str, Difference]], width: float) -> Figure:
    """A line for each difference: a dot and its interval, coloured where that excludes 0."""
    figure = new_figure(width, 0.6 + 0.22 * len(rows))
    axes = figure.subplots()
    for place, (_, difference) in enumerate(rows):
        color = SERIES[0] if difference.low > 0 else SERIES[1] if difference.high < 0 else INK
        axes.plot([100 * difference.low, 100 * difference.high], [place, place], color=color, linewidth=1.4)
        axes.plot(100 * difference.value, place, "o", color=color, markersize=4)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("points, with the 95 % interval over items and seeds")
    quiet(axes)
    return figure


def curves(results: Results) -> Figure:
    """The loss of every arm against the step, mean of the seeds and of WINDOW steps."""
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    for number, arm in enumerate(dict.fromkeys(arm for seed in results.seeds for arm in seed["losses"])):
        runs = [seed["losses"][arm] for seed in results.seeds if seed["losses"].get(arm)]
        if not runs:
            continue
        mean = np.mean([run[: min(map(len, runs))] for run in runs], axis=0)
        width = min(WINDOW, len(mean))
        smooth = np.convolve(mean, np.ones(width) / width, mode="valid")
        line = "-" if number < len(SERIES) else "--"
        color = SERIES[number % len(SERIES)]
        axes.plot(np.arange(width, len(mean) + 1), smooth, line, color=color, label=NAMES[arm], linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.legend(frameon=False, fontsize=8)
    quiet(axes)
    return figure


FIGURES: dict[str, Callable[[Results], Figure]] = {"forest": forest, "overview": overview, "curves": curves}
