"""An explanation made by hand: two heads, three tokens, two images. A test finds all of it on a page."""

import dataclasses

import numpy as np
from PIL import Image

from valm.explain.explanation import Explanation
from valm.explain.images import ShownImage

TEXT = [[0.50, 0, 0], [0.25, 0.25, 0], [0.40, 0.40, 0.20]]
IMAGES = [[0.40, 0.10], [0.25, 0.25], [0, 0]]


def explanation(**changes) -> Explanation:
    """Head 0 attends as TEXT and IMAGES say, head 1 only to the token itself."""
    itself = np.eye(3)
    made = Explanation(
        text="the bat",
        tokens=("(start)", "the", "bat"),
        text_weights=np.array([TEXT, itself], np.float32),
        image_weights=np.array([IMAGES, np.zeros((3, 2))], np.float32),
        image_index=np.array([[0, 1], [1, 0], [-1, -1]]),
        scores=np.array([[0.91, 0.5], [0.75, 0.25], [-np.inf, -np.inf]], np.float32),
        images=(ShownImage("a red ball", Image.new("RGB", (8, 8), "red")), ShownImage("no thumbnail", None)),
        answers=("red", "blue"),
        probabilities=np.array([0.7, 0.2], np.float32),
    )
    return dataclasses.replace(made, **changes)
