"""Figures show what they are given."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from valm.errors import ValmError

pytest.importorskip("matplotlib", reason="needs the extra [demo] or [eval]")
from valm import plots


def texts(figure) -> str:
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_loss_curves_have_a_line_for_each_model():
    figure = plots.loss_curves({"GPT-2*": np.linspace(3, 1, 50), "VaLM": [2.0, 1.0]})
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["GPT-2*", "VaLM"]
    smooth = axes.lines[1].get_ydata()
    assert len(smooth) == 41 and smooth[0] == pytest.approx(np.linspace(3, 1, 50)[:10].mean())


def test_attention_shows_every_token_and_picture():
    pictures = [[Image.new("RGB", (8, 8)), None], [Image.new("RGB", (8, 8))] * 2, [None, None]]
    text = np.array([[0.5, 0, 0], [0.25, 0.25, 0], [0.5, 0.3, 0.2]])
    image = np.array([[0.4, 0.1], [0.25, 0.25], [0.0, 0.0]])
    figure = plots.attention(["SOT", "a", "bat"], text, image, pictures)
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["SOT", "a", "bat"]
    assert np.ma.is_masked(left.images[0].get_array()[0, 1])  # what comes later is not shown
    assert len(right.images) == 3
    assert texts(figure).split() == ["50%", "50%", "0%"]


def test_answer_bars_mark_the_likeliest():
    figure = plots.answer_bars({"before": {"red": 0.7, "blue": 0.3}, "after": {"red": 0.1, "blue": 0.9}})
    assert [axes.get_title() for axes in figure.axes] == ["before", "after"]
    assert texts(figure) == "0.70 0.90"
    assert [bar.get_width() for bar in figure.axes[1].patches] == [0.1, 0.9]
    assert figure.axes[0].yaxis_inverted()  # the first word on top


def test_without_matplotlib_there_is_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValmError, match=r"matplotlib.*pip install"):
        plots.new_figure(1, 1)


def test_dollars_are_dollars():
    """Between two of them matplotlib would look for mathematics, and find none."""
    figure = plots.attention(["$$", "$x"], np.eye(2), np.ones((2, 1)), [[None], [None]])
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    assert "$$" in drawn.getvalue()
