"""Pictures in other colours for the study's CLIP."""

import pytest
from PIL import Image

from studies.color import pictures as pictures_module
from studies.color.pictures import collect_pictures, read_pictures
from studies.color.recolored import exchanged, recolored_captions, write_recolored
from studies.demo.things import RENDER_SIZE, Thing
from tests.studies.color.test_pictures import disc


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A red tomato, a thing without a colour, and a picture of a folder, recoloured."""
    things = [Thing("tomato", "red", disc("red", RENDER_SIZE)), Thing("flag", None, disc("red", RENDER_SIZE))]
    monkeypatch.setitem(pictures_module.DRAWINGS, "openmoji", lambda limit, progress: things[:limit])
    (tmp_path / "stamps").mkdir()
    disc("blue").save(tmp_path / "stamps" / "boat.png")
    sources = {"openmoji": {}, "stamps": {"folder": str(tmp_path / "stamps")}}
    out = tmp_path / "out"
    collect_pictures(sources, out, progress=False)
    write_recolored(sources, read_pictures(out), out, progress=False)
    return out


def test_a_drawing_with_a_colour_gets_each_colour_once(folder):
    captions = recolored_captions(folder, {"tomato": "red", "boat": "blue", "flag": "red"})
    said = {lines[0]: file for file, lines in captions.items()}
    assert set(said) == {"the green tomato", "the blue tomato"}
    assert all(len(lines) == len(set(lines)) == 7 for lines in captions.values())
    assert "a picture of a green tomato" in captions[said["the green tomato"]]
    with Image.open(folder / said["the green tomato"]) as image:
        red, green, blue = image.getpixel((image.width // 2, image.height // 2))
        assert green > 150 > 100 > max(red, blue)
    assert len(read_pictures(folder)) == 3  # the recoloured ones are in no knowledge base


def test_objects_whose_colour_is_not_said_are_left_out(folder):
    assert recolored_captions(folder, {"boat": "blue"}) == {}


def test_channels_are_exchanged():
    image = Image.new("RGBA", (1, 1), (1, 2, 3, 4))
    assert exchanged(image, (2, 0, 1)).getpixel((0, 0)) == (3, 1, 2, 4)
    assert exchanged(image.convert("RGB"), (1, 0, 2)).getpixel((0, 0)) == (2, 1, 3)
