import errno
import io
import json
import os

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from valm.errors import ValmError
from valm.knowledge_base import images
from valm.knowledge_base.images import PICTURE_SUFFIXES, find_pictures, read_captions, read_picture, thumbnail_bytes


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_pictures_are_found_in_order(tmp_path):
    touch(tmp_path, "b.JPG", "a/z.png", "a/.hidden.png", ".git/x.png", "notes.txt", "c.webp")
    assert find_pictures(tmp_path) == ["a/z.png", "b.JPG", "c.webp"]


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValmError, match=r"no folder .*nowhere"):
        find_pictures(tmp_path / "nowhere")
    touch(tmp_path, "notes.txt")
    with pytest.raises(ValmError, match="is not a folder"):
        find_pictures(tmp_path / "notes.txt")
    with pytest.raises(ValmError, match=r"no pictures in .*looked for files ending in .*\.png"):
        find_pictures(tmp_path)


def test_transparent_pixels_become_white(tmp_path):
    for mode, save in (("RGBA", {}), ("P", {"transparency": 0})):
        picture = Image.new(mode, (4, 4), 0)
        picture.save(tmp_path / "x.png", **save)
        assert read_picture(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)


def test_pictures_stand_upright(tmp_path):
    picture = Image.new("RGB", (8, 4))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "x.jpg", exif=exif)
    assert read_picture(tmp_path / "x.jpg").size == (4, 8)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises((ValueError, Image.DecompressionBombError), match="pixels"):
        read_picture(tmp_path / "bomb.png")


def test_the_limit_counts_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    Image.new("RGB", (10, 10)).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png").size == (10, 10)
    Image.new("RGB", (10, 11)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="10 x 11 pixels, more than the 100 allowed"):
        read_picture(tmp_path / "x.png")


def test_a_thread_of_pixels_is_refused_before_it_is_enlarged(tmp_path):
    Image.new("1", (64, 1)).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png").size == (64, 1)
    for size in ((65, 1), (1, 65_000)):
        Image.new("1", size).save(tmp_path / "x.png")
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels, one side more than 64 times the other"):
            read_picture(tmp_path / "x.png")


def test_the_content_must_be_of_a_known_format(tmp_path, monkeypatch):
    for suffix in PICTURE_SUFFIXES:
        Image.new("RGB", (8, 8)).save(tmp_path / f"x{suffix}")
        assert read_picture(tmp_path / f"x{suffix}").size == (8, 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("handed to Ghostscript"))
    with pytest.raises(ValueError, match="not a picture in one of the formats JPEG, PNG"):
        read_picture(tmp_path / "x.png")


def test_thumbnails(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 100, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    small = Image.open(io.BytesIO(thumbnail_bytes(picture, 20)))
    assert (small.format, small.size, picture.size) == ("JPEG", (20, 10), (100, 50))


def test_captions_beside_the_picture(tmp_path):
    touch(tmp_path, "a.png", "b/c.png", "d.png", "e.png")
    (tmp_path / "a.txt").write_text("a red\tapple \n\nan apple\n")
    (tmp_path / "b/c.json").write_text(json.dumps({"caption": "a dog", "url": "x"}))
    (tmp_path / "d.json").write_text(json.dumps({"url": "x"}))
    names = find_pictures(tmp_path)
    expected = {"a.png": "a red apple\nan apple", "b/c.png": "a dog"}
    assert read_captions(tmp_path, names) == (expected, {})


def test_damaged_caption_files_are_listed(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "a.json").write_text('{"caption": "cut')
    (tmp_path / "b.txt").write_text("a" * images.MAX_CAPTION_BYTES)
    (tmp_path / "c.txt").write_text("a" * (images.MAX_CAPTION_BYTES + 1))
    os.mkfifo(tmp_path / "d.txt")  # opened, it would be waited for
    captions, damaged = read_captions(tmp_path, find_pictures(tmp_path))
    assert list(captions) == ["b.png"]
    assert list(damaged) == ["a.json", "c.txt"]
    assert "not JSON" in damaged["a.json"] and "more than 1,048,576 bytes" in damaged["c.txt"]


def test_what_cannot_be_read_now_is_an_error(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "b/c.png")
    (tmp_path / "a.txt").write_text("a")

    def denied(path, *_):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patched, pytest.raises(ValmError, match=r"cannot read .*a\.txt: Input/output error"):
        patched.setattr("builtins.open", denied)
        read_captions(tmp_path, ["a.png"])
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: denied(path) if str(path).endswith("b") else scandir(path))
    with pytest.raises(ValmError, match=r"cannot read the folder .*/b: Input/output error"):
        find_pictures(tmp_path)


def test_caption_tables(tmp_path):
    touch(tmp_path, "images/a.png", "images/b.png", "captions.png")
    names = find_pictures(tmp_path)
    (tmp_path / "captions.txt").write_text('image,caption\na.png,a red apple\na.png,"one, two"\nimages/b.png,a dog\n')
    assert read_captions(tmp_path, names)[0] == {"images/a.png": "a red apple\none, two", "images/b.png": "a dog"}
    # what stands beside the picture goes before the table; a table may lie anywhere
    (tmp_path / "images/b.txt").write_text("a cat")
    (tmp_path / "table.csv").write_text("id\tText\tFile\n1\ta pear\ta.png\n")
    assert read_captions(tmp_path, names)[0]["images/b.png"] == "a cat"
    assert read_captions(tmp_path, names, tmp_path / "table.csv")[0]["images/a.png"] == "a pear"
    (tmp_path / "table.json").write_text(json.dumps({"a.png": ["x", "y"], "captions.png": "z"}))
    found, _ = read_captions(tmp_path, names, tmp_path / "table.json")
    assert found == {"images/a.png": "x\ny", "images/b.png": "a cat", "captions.png": "z"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"a.png,a red apple\n", "starts with 'a.png,a red apple'; expected a header"),
        ("t.csv", b"image,caption\n\xff\xfe,x\n", "cannot read the caption table"),
        ("t.json", b"{", "cannot read the caption table"),
        ("t.json", b"[1]", "holds a list; expected an object"),
        ("t.json", b'{"a.png": 3}', "the caption of 'a.png' in .* is neither"),
        ("missing.csv", None, r"cannot read .*missing\.csv: No such file"),
    ],
)
def test_broken_caption_tables(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValmError, match=message):
        read_captions(tmp_path, ["a.png"], tmp_path / name)
