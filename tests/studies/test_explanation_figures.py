"""Figures show what they are given."""

import io

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra [demo] or [eval]")
from studies import explanation_figures as figures
from tests.valm.explain.explanations import explanation


def texts(figure) -> str:
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_attention_shows_every_token_and_image():
    left, right, bar = figures.attention(explanation()).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["(start)", "the", "bat"]
    shown = left.images[0].get_array()
    assert np.ma.is_masked(shown[0, 1])  # what comes later is not shown
    np.testing.assert_allclose(shown[2], [0.2, 0.2, 0.6], rtol=1e-6)  # the mean of both heads
    assert len(right.images) == 2  # the red ball, for the first two tokens
    assert [text.get_text() for text in right.texts] == ["25%", "25%", "0%"]
    assert bar.get_ylabel() == "share of the attention" and bar.get_ylim() == (0, 1)


def test_attention_without_images_is_of_the_text_alone():
    none = {"image_weights": np.zeros((2, 3, 0)), "image_index": np.zeros((3, 0), int), "images": ()}
    axes, _ = figures.attention(explanation(**none, scores=np.zeros((3, 0)))).axes
    assert axes.get_title() == "text"


def test_two_models_have_one_scale():
    """Equal weights look the same, whatever else a model looks at."""
    whole = explanation()
    half = explanation(text_weights=whole.text_weights / 2, image_weights=whole.image_weights / 2)
    figure = figures.explanation_rows({"whole": whole, "half": half})
    heat = [image for axes in figure.axes if axes.get_title() == "text" for image in axes.images]
    assert [image.get_clim() for image in heat] == [(0, 1), (0, 1)]
    np.testing.assert_array_equal(heat[1].get_array(), heat[0].get_array() / 2)
    panels = [axes for axes in figure.axes if "images" in axes.get_title()]
    first, second = ([line.get_xdata()[1] - line.get_xdata()[0] for line in axes.lines] for axes in panels)
    np.testing.assert_allclose(first, 2 * np.array(second), atol=1e-6)
    assert max(first) == pytest.approx(0.92) and all("whole bar: 20%" in axes.get_title() for axes in panels)


def test_answer_bars_mark_the_likeliest():
    figure = figures.answer_bars({"before": {"red": 0.7, "blue": 0.3}, "after": {"red": 0.1, "blue": 0.9}})
    assert [axes.get_title() for axes in figure.axes] == ["before", "after"]
    assert texts(figure) == "0.70 0.90"
    assert [bar.get_width() for bar in figure.axes[1].patches] == [0.1, 0.9]
    assert figure.axes[0].yaxis_inverted()  # the first word on top


def test_a_model_that_says_no_word_has_no_bars(tmp_path):
    figure = figures.explanation_rows({"valm": explanation(answers=(), probabilities=np.zeros(0))})
    assert len(figure.axes[-1].patches) == 0
    figure.savefig(tmp_path / "drawn.png")


def test_dollars_are_dollars():
    """Between two of them matplotlib would look for mathematics, and find none."""
    figure = figures.attention(explanation(tokens=("$$", "$x", "\u202ex")))
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    assert "$$" in drawn.getvalue() and "\u202e" not in drawn.getvalue()
