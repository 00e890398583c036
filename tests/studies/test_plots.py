"""Figures show what they are given."""

import sys

import numpy as np
import pytest

from valm.errors import ValmError

pytest.importorskip("matplotlib", reason="needs the extra [demo]")
from studies import plots


def test_loss_curves_have_a_line_for_each_model():
    figure = plots.loss_curves({"GPT-2*": np.linspace(3, 1, 50), "VaLM": [2.0, 1.0]})
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["GPT-2*", "VaLM"]
    smooth = axes.lines[1].get_ydata()
    assert len(smooth) == 41 and smooth[0] == pytest.approx(np.linspace(3, 1, 50)[:10].mean())


def test_without_matplotlib_there_is_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValmError, match=r"matplotlib.*pip install"):
        plots.new_figure(1, 1)
