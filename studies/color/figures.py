"""The figure of docs/results/study.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.color.comparisons import (
    BASE,
    BLIND,
    CUT,
    PRIMARY,
    READING,
    READING_BLIND,
    READING_BLIND_ALL,
    TWIN,
    VALM,
    WITH_PICTURE,
    WITHOUT_PICTURE,
    studied,
)
from studies.color.config import DOSES
from studies.color.hypotheses import CONTROLS, best
from studies.color.results import APART, RAW, Results
from studies.plots import FAINT, INK, SERIES, new_figure, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Titles that fit next to an axis.
SHORT = {RAW: "uncalibrated", APART: "calibrated"}
NAMES = {
    BASE: "base model",
    TWIN: "text-only baseline",
    BLIND: "query control",
    VALM: "VaLM, no threshold",
    CUT: "VaLM, threshold",
    READING: "VaLM, for reading",
    READING_BLIND: "query control, for reading",
    READING_BLIND_ALL: "query control at all tokens, for reading",
}
# Percent of the items' pictures in the knowledge base, and what the studied arm is then tested with.
PICTURES = {100: "retrieved", **{percent: dose for dose, percent in DOSES.items()}, 0: "taken-out"}


def dose(results: Results) -> Figure:
    """Accuracy against the pictures that are left, and gains over the base model, with and without a picture."""
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    _curve(left, results)
    _gains(right, results)
    return figure


def _curve(axes: Axes, results: Results) -> None:
    arm = studied(results)
    for measure, color in zip((RAW, APART), SERIES, strict=False):
        found = {
            percent: one
            for percent, images in PICTURES.items()
            if (one := results.accuracy((arm[0], images), PRIMARY, measure, WITH_PICTURE.keep))
        }
        if not found:  # if only validation objects were asked
            continue
        values, lows, highs = 100 * np.array([one[:3] for one in found.values()]).T
        axes.plot(list(found), values, "o-", color=color, label=f"{NAMES[arm]}, {SHORT[measure]}")
        axes.fill_between(list(found), lows, highs, color=color, alpha=0.15, linewidth=0)
        for other, line in ((best(results, CONTROLS[arm]), "--"), (BASE, ":")):
            one = results.accuracy(other, PRIMARY, measure, WITH_PICTURE.keep)
            if one is not None:
                axes.axhline(100 * one.value, color=color, linestyle=line, label=f"{NAMES[other]}, {SHORT[measure]}")
    axes.set_xlabel("pictures left in the knowledge base, %")
    axes.set_ylabel("correct, objects with a picture, %")
    axes.legend(frameon=False, fontsize=7, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    quiet(axes)


def _gains(axes: Axes, results: Results) -> None:
    """The difference of each arm to the base in points, with its interval."""
    rows, control = [], best(results, CONTROLS[studied(results)])
    for arm in dict.fromkeys((TWIN, control, VALM, CUT, studied(results))):
        for items, color in ((WITH_PICTURE, SERIES[0]), (WITHOUT_PICTURE, SERIES[1])):
            for measure in (RAW, APART):
                found = results.difference(arm, BASE, PRIMARY, measure, items.keep)
                if found is not None:
                    kind = "picture" if items is WITH_PICTURE else "no picture"
                    rows.append((f"{NAMES[arm]}, {kind}, {SHORT[measure]}", found, color))
    for place, (_, found, color) in enumerate(rows):
        axes.plot([100 * found.low, 100 * found.high], [place, place], color=color, linewidth=1.4)
        axes.plot(100 * found.value, place, "o", color=color, markersize=4)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [title for title, _, _ in rows], fontsize=7, color=INK)
    axes.invert_yaxis()
    axes.set_xlabel("points over the base model, MemoryColor")
    quiet(axes)
