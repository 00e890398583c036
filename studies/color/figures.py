"""The figure of docs/results/study.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.color.comparisons import ALL_OF_PEOPLE, CONTROL, VALIDATION_OBJECTS, VALM, Items, arm_title
from studies.color.results import Results
from studies.plots import SERIES, new_figure, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def curve(results: Results) -> Figure:
    """Accuracy of VaLM and of the query control by steps of training, with intervals."""
    figure = new_figure(9, 3.6)
    for axes, items in zip(figure.subplots(1, 2), (VALIDATION_OBJECTS, ALL_OF_PEOPLE), strict=True):
        _curves(axes, results, items)
    return figure


def _curves(axes: Axes, results: Results, items: Items) -> None:
    for arm, color in zip((VALM, CONTROL), SERIES, strict=False):
        asked = {steps: results.accuracy(one, items.of) for steps, one in results.curve(arm[0]).items()}
        found = {steps: one for steps, one in asked.items() if one is not None}
        if not found:  # without a curve, or if only validation objects were asked
            continue
        values, lows, highs = 100 * np.array([one[:3] for one in found.values()]).T
        axes.plot(list(found), values, "o-", color=color, label=arm_title(arm))
        axes.fill_between(list(found), lows, highs, color=color, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_xticks(list(found), list(map(str, found)), minor=False)
        axes.minorticks_off()
        axes.legend(frameon=False)
    axes.set_title(items.title, fontsize=10)
    axes.set_xlabel("steps of training")
    axes.set_ylabel("correct, uncalibrated, %")
    quiet(axes)
