"""Drawings in random colours: the names of the colours that they have afterwards say nothing of the drawing."""

import random
from collections import Counter

import numpy as np
from PIL import Image, ImageDraw

from studies.color.recoloring import SHADES, recolored
from studies.demo.things import COLORS, label_color


def disk(rgb, size=144):
    """A drawing in one colour with a black line around it, on a transparent ground."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    place = (size // 7, size // 7, size * 6 // 7, size * 6 // 7)
    ImageDraw.Draw(image).ellipse(place, fill=(*rgb, 255), outline=(0, 0, 0, 255), width=size // 48)
    return image


def test_each_colour_is_drawn_about_as_often_whatever_the_drawing_is():
    for rgb in ((220, 30, 30), (250, 250, 250), (40, 40, 40)):
        draw = random.Random(0)
        found = Counter(label_color(recolored(disk(rgb, 48), draw)) for _ in range(220))
        assert set(found) == set(COLORS) == set(SHADES)
        assert max(found.values()) < 2.5 * min(found.values())


def test_only_colours_change_and_the_seed_decides_them():
    drawing = disk((220, 30, 30))
    once, again, other = (recolored(drawing, random.Random(seed)) for seed in (1, 1, 2))
    assert np.array_equal(np.asarray(once), np.asarray(again))
    assert not np.array_equal(np.asarray(once), np.asarray(other))
    assert np.array_equal(np.asarray(once)[..., 3], np.asarray(drawing)[..., 3])
