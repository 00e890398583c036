"""The pictures of what VaLM sees and answers."""

import numpy as np
import pytest
from PIL import Image

from studies.color.config import StudyConfig
from studies.color.exhibits import Example, examples, write_exhibits
from studies.color.study import Study
from studies.plots import SERIES
from valm.errors import ValmError
from valm.explain.explanation import Explanation
from valm.explain.images import ShownImage


def asked(thing, right):
    """A question about `thing` that one image was found for, and that is answered by red."""
    shown = (ShownImage(thing, Image.new("RGB", (8, 8), "red")),)
    weights, none = np.zeros((2, 1, 1), np.float32), np.array([[0, -1]])
    answers = ("red", "blue"), np.array([0.7, 0.3], np.float32)
    return Example(
        Explanation(f"the color of the {thing} is", ("is",), weights, weights, none, none, shown, *answers), right
    )


def test_a_wrong_answer_is_told_from_a_right_one():
    figure = examples({"drawn": [asked("kettle", "red"), asked("scarf", "blue"), asked("cup", "red")], "none": []})
    texts = {text.get_text(): text.get_color() for part in figure.subfigs for axes in part.axes for text in axes.texts}
    assert texts["red (right: blue)"] == SERIES[1]
    assert texts["red"] == SERIES[0]
    assert "the color of the cup is" in texts
    images = [image for part in figure.subfigs for axes in part.axes for image in axes.images]
    assert len(images) == 3  # a slot without an image shows none
    assert [part.get_suptitle() for part in figure.subfigs] == ["drawn", "none"]


def test_a_seed_that_has_not_run_is_named(tmp_path):
    config = StudyConfig(name="tiny", language_model="", pictures={}, clip={}, text={}, training={}, seeds=(3,))
    with pytest.raises(ValmError, match=r"has no VaLM of seed 3: run `python -m studies.color run`"):
        write_exhibits(Study(config, tmp_path, print, None), 3, tmp_path)
