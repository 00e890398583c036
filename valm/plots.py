"""Figures: loss curves, what a token looks at, how likely each answer is. They need the extra `demo` or `eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from valm.errors import ValmError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#23272e"
FAINT = "#b9bec6"
SERIES = ("#2f6fb0", "#d9772b", "#5b9a4b", "#8a63a8")
SWATCHES = {
    "white": "#fbfbfb",
    "yellow": "#f5d327",
    "green": "#5c9e31",
    "red": "#d22f27",
    "grey": "#9b9b9a",
    "brown": "#7a5230",
    "black": "#222222",
    "blue": "#3f8fd0",
    "purple": "#8967aa",
    "pink": "#f59ab4",
    "orange": "#e27022",
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. Raises ValmError where matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValmError(f"figures need the package matplotlib ({error}): pip install 'valm[demo]'") from error
    # Text stays text, so a figure can be searched and copied from.
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["font.family"] = "sans-serif"
    matplotlib.rcParams["text.parse_math"] = False  # a token may be $$
    return Figure(figsize=(width, height), layout="constrained")


def loss_curves(curves: Mapping[str, Sequence[float]], *, window: int = 10) -> Figure:
    """Loss against step, each curve as the mean of `window` steps over the raw losses in a paler tone."""
    figure = new_figure(6.4, 3.2)
    axes = figure.subplots()
    for (name, values), color in zip(curves.items(), SERIES, strict=False):
        losses = np.asarray(values)
        axes.plot(np.arange(1, len(losses) + 1), losses, color=color, alpha=0.2, linewidth=0.8)
        if len(losses) >= window:
            smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
            axes.plot(np.arange(window, len(losses) + 1), smooth, color=color, label=name, linewidth=1.8)
        else:
            axes.plot(np.arange(1, len(losses) + 1), losses, color=color, label=name, linewidth=1.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.legend(frameon=False)
    _quiet(axes)
    return figure


def attention(
    tokens: Sequence[str],
    text_weights: np.ndarray,
    image_weights: np.ndarray,
    pictures: Sequence[Sequence[Image.Image | None]],
) -> Figure:
    """What each token looks at in the fusion block: the text before it and its own pictures, out of one softmax.

    Args:
        tokens: T strings.
        text_weights: (T, T), row = the token that looks, column = the token looked at.
        image_weights: (T, K).
        pictures: T rows of K pictures; None = no picture in this slot.
    """
    rows, slots = image_weights.shape
    cell = 0.5
    figure = new_figure(cell * (rows + slots) + 2.8, cell * rows + 1.3)
    text_axes, image_axes = figure.subplots(1, 2, width_ratios=[rows, slots])
    causal = np.ma.masked_where(np.triu(np.ones((rows, rows), bool), 1), text_weights)
    text_axes.imshow(causal, cmap="Blues", vmin=0, vmax=max(text_weights.max(), image_weights.max()), aspect="equal")
    text_axes.set_xticks(range(rows), tokens, rotation=60, ha="right", rotation_mode="anchor")
    text_axes.set_yticks(range(rows), tokens)
    text_axes.set_title("text", color=INK, fontsize=10)

    image_axes.set_xlim(-0.5, slots - 0.5)
    image_axes.set_ylim(rows - 0.5, -0.5)
    image_axes.set_aspect("equal")
    largest = image_weights.max()
    for row in range(rows):
        for slot in range(slots):
            share = image_weights[row, slot] / largest if largest > 0 else 0.0
            left, bottom = slot - 0.46, row + 0.46
            # The more weight, the clearer the picture and the longer the bar below it.
            picture = pictures[row][slot]
            if picture is not None:
                image_axes.imshow(
                    np.asarray(picture.convert("RGB")),
                    extent=(left, left + 0.92, bottom, bottom - 0.92),
                    alpha=0.15 + 0.85 * share,
                    interpolation="none",
                )
            image_axes.plot([left, left + 0.92 * share], [bottom] * 2, color=SERIES[0], linewidth=2.5)
        image_axes.text(slots - 0.4, row, f"{image_weights[row].sum():.0%}", va="center", fontsize=9, color=INK)
    image_axes.set_xticks([])
    image_axes.set_yticks([])
    image_axes.set_title("its own pictures, and their share", color=INK, fontsize=10)
    for axes in (text_axes, image_axes):
        _quiet(axes)
        axes.tick_params(length=0)
    for side in ("left", "bottom"):
        image_axes.spines[side].set_visible(False)
    return figure


def answer_bars(answers: Mapping[str, Mapping[str, float]]) -> Figure:
    """Probabilities of answers side by side, one panel for each setting, the likeliest answer in bold.

    Args:
        answers: for each setting (the panel's title) the probability of each colour word.
    """
    figure = new_figure(2.9 * len(answers), 2.9)
    panels = np.atleast_1d(figure.subplots(1, len(answers), sharey=True))
    for axes, (setting, probabilities) in zip(panels, answers.items(), strict=True):
        words = list(probabilities)
        values = [probabilities[word] for word in words]
        axes.barh(words, values, color=[SWATCHES.get(word, FAINT) for word in words], edgecolor=INK, linewidth=0.6)
        axes.set_xlim(0, 1)
        axes.set_title(setting, color=INK, fontsize=10)
        best = int(np.argmax(values))
        axes.text(min(values[best] + 0.03, 0.8), best, f"{values[best]:.2f}", va="center", fontweight="bold", color=INK)
        _quiet(axes)
    panels[0].invert_yaxis()  # of all panels, which share it; the first word on top
    return figure


def _quiet(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
