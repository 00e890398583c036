import errno
import io
import os

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from tests.valm.knowledge_base.inputs import touch
from valm.errors import ValmError
from valm.knowledge_base import images
from valm.knowledge_base.images import IMAGE_SUFFIXES, find_images, read_image, thumbnail_bytes


def test_pictures_are_found_in_order(tmp_path):
    touch(tmp_path, "b.JPG", "a/z.png", "a/.hidden.png", ".git/x.png", "notes.txt", "c.webp")
    assert find_images(tmp_path) == ["a/z.png", "b.JPG", "c.webp"]


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValmError, match=r"no folder .*nowhere"):
        find_images(tmp_path / "nowhere")
    touch(tmp_path, "notes.txt")
    with pytest.raises(ValmError, match="is not a folder"):
        find_images(tmp_path / "notes.txt")
    with pytest.raises(ValmError, match=r"no pictures in .*looked for files ending in .*\.png"):
        find_images(tmp_path)


def test_transparent_pixels_become_white(tmp_path):
    for mode, save in (("RGBA", {}), ("P", {"transparency": 0})):
        picture = Image.new(mode, (4, 4), 0)
        picture.save(tmp_path / "x.png", **save)
        assert read_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)


def test_pictures_stand_upright(tmp_path):
    picture = Image.new("RGB", (8, 4))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == (4, 8)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises((ValueError, Image.DecompressionBombError), match="pixels"):
        read_image(tmp_path / "bomb.png")


def test_the_limit_counts_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    Image.new("RGB", (10, 10)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").size == (10, 10)
    Image.new("RGB", (10, 11)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="10 x 11 pixels, more than the 100 allowed"):
        read_image(tmp_path / "x.png")


def test_a_thread_of_pixels_is_refused_before_it_is_enlarged(tmp_path):
    Image.new("1", (64, 1)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").size == (64, 1)
    for size in ((65, 1), (1, 65_000)):
        Image.new("1", size).save(tmp_path / "x.png")
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels, one side more than 64 times the other"):
            read_image(tmp_path / "x.png")


def test_the_content_must_be_of_a_known_format(tmp_path, monkeypatch):
    for suffix in IMAGE_SUFFIXES:
        Image.new("RGB", (8, 8)).save(tmp_path / f"x{suffix}")
        assert read_image(tmp_path / f"x{suffix}").size == (8, 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("handed to Ghostscript"))
    with pytest.raises(ValueError, match="not a picture in one of the formats JPEG, PNG"):
        read_image(tmp_path / "x.png")


def test_thumbnails(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 100, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    small = Image.open(io.BytesIO(thumbnail_bytes(picture, 20)))
    assert (small.format, small.size, picture.size) == ("JPEG", (20, 10), (100, 50))


def test_what_cannot_be_read_now_is_an_error(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "b/c.png")

    def denied(path, *_):
        raise OSError(errno.EIO, "Input/output error", str(path))

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: denied(path) if str(path).endswith("b") else scandir(path))
    with pytest.raises(ValmError, match=r"cannot read the folder .*/b: Input/output error"):
        find_images(tmp_path)
