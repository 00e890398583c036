"""Figures: their common style, and loss curves. They need the extra `demo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from valm.errors import ValmError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#23272e"
FAINT = "#b9bec6"
SERIES = ("#2f6fb0", "#d9772b", "#5b9a4b", "#8a63a8")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches.

    Raises:
        ValmError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValmError(f"figures need the package matplotlib ({error}): pip install matplotlib") from error
    # Saves text as text, so that it can be searched and copied.
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["font.family"] = "sans-serif"
    matplotlib.rcParams["text.parse_math"] = False  # a token may be $$
    matplotlib.rcParams["text.color"] = matplotlib.rcParams["axes.labelcolor"] = INK
    return Figure(figsize=(width, height), layout="constrained")


def loss_curves(curves: Mapping[str, Sequence[float]], *, window: int = 10) -> Figure:
    """Loss against step: each curve is the mean of `window` steps, drawn over the raw losses in a paler tone."""
    figure = new_figure(4.4, 2.9)
    axes = figure.subplots()
    for (name, values), color in zip(curves.items(), SERIES, strict=False):
        axes.plot(np.arange(1, len(values) + 1), values, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(*smoothed(values, window), color=color, label=name, linewidth=1.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.legend(frameon=False)
    quiet(axes)
    return figure


def smoothed(losses: Sequence[float], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean loss of so many steps up to each; of fewer where the training was shorter."""
    window = min(window, len(losses))
    return np.arange(window, len(losses) + 1), np.convolve(losses, np.ones(window) / window, mode="valid")


def quiet(axes: Axes) -> None:
    """Removes the frame and sets the colours of the other figures."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(which="both", colors=INK, labelsize=9)
