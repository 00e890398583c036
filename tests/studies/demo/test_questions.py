"""The questions and the exchange of two channels."""

import pytest
from PIL import Image

from studies.demo.questions import plain_question, swap_red_and_blue
from valm.evaluation.sets import Item


def test_swap_turns_red_into_blue_and_leaves_grey():
    red = swap_red_and_blue(Image.new("RGB", (1, 1), (200, 10, 20)))
    assert red.getpixel((0, 0)) == (20, 10, 200)
    assert swap_red_and_blue(Image.new("RGB", (1, 1), (9, 9, 9))).getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize(
    ("descriptor", "question"),
    [("a", "The color of a bat is"), ("", "The color of bat is"), (None, "The color of the bat is")],
)
def test_plain_question(descriptor, question):
    assert plain_question(Item("bat", "black", descriptor)) == question
