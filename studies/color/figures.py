"""The figures of docs/results/study.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from studies.color.comparisons import (
    MEASURES,
    NATURAL,
    PAIRS,
    PRIMARY,
    RANDOM_IMAGES,
    SECONDARY,
    fewer_seeds,
    retrieval_tests,
    set_title,
)
from studies.color.config import ARMS, VALIDATION
from studies.color.results import RAW, Found, Results
from studies.plots import FAINT, INK, SERIES, new_figure, quiet, smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Steps of the learning curves that are averaged.
WINDOW = 20


def forest(results: Results) -> Figure:
    """The differences of the plan with their intervals, in points."""
    asked = [
        (f"{pair}: {set_title(of)}, {measure}", pair, of, measure) for pair in PAIRS for of, measure in MEASURES[:6]
    ]
    tests = [(test.title, test.found) for test in retrieval_tests(results)]
    return _intervals(results, [*_differences(results, asked), *tests], 9)


def overview(results: Results) -> Figure:
    """A few of the differences of `forest`."""
    asked = [("colours that no text says, VaLM − twin", "VaLM − twin", VALIDATION, RAW)]
    asked += [(f"{set_title(of)}, VaLM − twin", "VaLM − twin", of, RAW) for of in (PRIMARY, *SECONDARY)]
    pairs = (RANDOM_IMAGES, "VaLM − Blind", NATURAL)
    asked += [(f"{set_title(PRIMARY)}, {pair}", pair, PRIMARY, RAW) for pair in pairs]
    tests = [(test.title, test.found) for test in retrieval_tests(results) if (test.arm, test.of) == ("valm", PRIMARY)]
    return _intervals(results, [*_differences(results, asked), *tests], 6)


def _differences(results: Results, asked: Sequence[tuple[str, str, str, str]]) -> list[tuple[str, Found]]:
    found = ((title, results.difference(*PAIRS[pair], of, measure)) for title, pair, of, measure in asked)
    return [(title, one) for title, one in found if one is not None]


def _intervals(results: Results, rows: Sequence[tuple[str, Found]], width: float) -> Figure:
    """A line for each difference: a dot and its interval, coloured where that excludes 0."""
    figure = new_figure(width, 0.6 + 0.22 * len(rows))
    axes = figure.subplots()
    for place, (_, found) in enumerate(rows):
        color = SERIES[0] if found.low > 0 else SERIES[1] if found.high < 0 else INK
        axes.plot([100 * found.low, 100 * found.high], [place, place], color=color, linewidth=1.4)
        axes.plot(100 * found.value, place, "o", color=color, markersize=4)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [title + fewer_seeds(found, results) for title, found in rows], fontsize=8)
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
        line = "-" if number < len(SERIES) else "--"
        color = SERIES[number % len(SERIES)]
        axes.plot(*smoothed(mean, WINDOW), line, color=color, label=ARMS[arm].title, linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.legend(frameon=False, fontsize=8)
    quiet(axes)
    return figure


FIGURES: dict[str, Callable[[Results], Figure]] = {"forest": forest, "overview": overview, "curves": curves}
