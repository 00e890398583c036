"""Figures of explanations: what each token looks at, and how likely each answer is (Figures 2 and 3 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from studies.plots import FAINT, INK, SERIES, new_figure, quiet, transparent_to
from valm.explain.explanation import Explanation
from valm.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 0.5  # inches, of a token's row
BARS_HEIGHT = 2.9  # inches
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


def explanation_rows(explanations: Mapping[str, Explanation]) -> Figure:
    """A row for each explanation, with one scale for all: on the left the attention of each token, on the right the
    answers."""
    largest_image = max(map(_largest_image, explanations.values()))
    sizes = [_attention_size(explanation) for explanation in explanations.values()]
    heights = [max(height, BARS_HEIGHT) + 0.5 for _, height in sizes]
    left, right = max(width for width, _ in sizes), 3.6
    figure = new_figure(left + right, sum(heights))
    rows = figure.subfigures(len(explanations), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, (name, explanation) in zip(rows, explanations.items(), strict=True):
        row.suptitle(printable(f"{explanation.text} …   ({name})"), x=0.01, ha="left", color=INK, fontsize=12)
        looks, answers = row.subfigures(1, 2, width_ratios=[left, right])
        _draw_attention(looks, explanation, largest_image)
        probabilities = dict(zip(explanation.answers, explanation.probabilities.tolist(), strict=True))
        axes = answers.subplots()
        _draw_answers(axes, probabilities)
        axes.set_title("what comes next", color=INK, fontsize=10)
        axes.invert_yaxis()
    return figure


def attention(explanation: Explanation) -> Figure:
    """The attention of each token in the fusion layer, over the text before it and its own images, from one softmax;
    the mean over the heads."""
    figure = new_figure(*_attention_size(explanation))
    _draw_attention(figure, explanation, _largest_image(explanation))
    return figure


def answer_bars(answers: Mapping[str, Mapping[str, float]]) -> Figure:
    """Probabilities of answers side by side, one panel for each setting, the likeliest answer in bold.

    Args:
        answers: for each setting (the panel's title) the probability of each word; colour words have their colours.
    """
    figure = new_figure(2.9 * len(answers), BARS_HEIGHT)
    panels = np.atleast_1d(figure.subplots(1, len(answers), sharey=True))
    for axes, (setting, probabilities) in zip(panels, answers.items(), strict=True):
        _draw_answers(axes, probabilities)
        axes.set_title(setting, color=INK, fontsize=10)
    panels[0].invert_yaxis()  # of all panels, which share it; the first word on top
    return figure


def _attention_size(explanation: Explanation) -> tuple[float, float]:
    rows, slots = explanation.image_weights.shape[1:]
    return CELL * (rows + slots) + 3.6, CELL * rows + 1.3


def _largest_image(explanation: Explanation) -> float:
    return float(explanation.weights()[1].max(initial=0.0))


def _draw_attention(figure: Figure, explanation: Explanation, largest_image: float) -> None:
    """The colours of the text go from 0 to 100 %; the bars of images are relative to `largest_image`."""
    text_weights, image_weights = explanation.weights()
    rows, slots = image_weights.shape
    tokens = [printable(token) for token in explanation.tokens]
    if slots:
        text_axes, image_axes = figure.subplots(1, 2, width_ratios=[rows, slots])
        _draw_images(image_axes, explanation, image_weights, largest_image)
    else:
        text_axes = figure.subplots()
    causal = np.ma.masked_where(np.triu(np.ones((rows, rows), bool), 1), text_weights)
    heat = text_axes.imshow(causal, cmap=transparent_to(SERIES[0]), vmin=0, vmax=1, aspect="equal")
    scale = figure.colorbar(heat, ax=text_axes, ticks=[0, 0.5, 1], format="{x:.0%}", shrink=0.6, aspect=12)
    scale.set_label("share of the attention", color=INK, fontsize=9)
    scale.outline.set_visible(False)
    scale.ax.tick_params(colors=INK, labelsize=9, length=0)
    text_axes.set_xticks(range(rows), tokens, rotation=60, ha="right", rotation_mode="anchor")
    text_axes.set_yticks(range(rows), tokens)
    text_axes.set_title("text", color=INK, fontsize=10)
    quiet(text_axes)
    text_axes.tick_params(length=0)


def _draw_images(axes: Axes, explanation: Explanation, weights: np.ndarray, largest: float) -> None:
    """The images of each token in a row, and at its end their share together. weights: (T, K); largest: that of a whole
    bar."""
    rows, slots = weights.shape
    axes.set_xlim(-0.5, slots - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_aspect("equal")
    for row in range(rows):
        for slot in range(slots):
            share = weights[row, slot] / largest if largest > 0 else 0.0
            left, bottom = slot - 0.46, row + 0.46
            # The more weight, the clearer the image and the longer the bar below it.
            number = explanation.image_index[row, slot]
            thumbnail = explanation.images[number].thumbnail if number >= 0 else None
            if thumbnail is not None:
                axes.imshow(
                    np.asarray(thumbnail.convert("RGB")),
                    extent=(left, left + 0.92, bottom, bottom - 0.92),
                    alpha=0.15 + 0.85 * share,
                    interpolation="none",
                )
            bar = [left, left + 0.92 * share]
            axes.plot(bar, [bottom] * 2, color=SERIES[0], linewidth=2.5, solid_capstyle="butt")
        axes.text(slots - 0.4, row, f"{weights[row].sum():.0%}", va="center", fontsize=9, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"its own images, and their share (whole bar: {100 * largest:.3g}%)", color=INK, fontsize=10)
    quiet(axes)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _draw_answers(axes: Axes, probabilities: Mapping[str, float]) -> None:
    words = list(probabilities)
    values = [probabilities[word] for word in words]
    colors = [SWATCHES.get(word, FAINT) for word in words]
    axes.barh([printable(word) for word in words], values, color=colors, edgecolor=INK, linewidth=0.6)
    axes.set_xlim(0, 1.2)  # room for the number behind the longest bar
    axes.set_xticks([0, 0.5, 1])
    if values:
        best = int(np.argmax(values))
        axes.text(values[best] + 0.03, best, f"{values[best]:.2f}", va="center", fontweight="bold", color=INK)
    quiet(axes)
