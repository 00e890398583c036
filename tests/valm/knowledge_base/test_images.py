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
    assert find_images(tmp_path).images == ["a/z.png", "b.JPG", "c.webp"]


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValmError, match=r"no folder .*nowhere"):
        find_images(tmp_path / "nowhere")
    touch(tmp_path, "notes.txt")
    with pytest.raises(ValmError, match="is not a folder"):
        find_images(tmp_path / "notes.txt")
    with pytest.raises(ValmError, match=r"no images in .*looked for files ending in .*\.png"):
        find_images(tmp_path)


def test_what_is_passed_over_is_counted(tmp_path):
    touch(tmp_path / "pictures", "a.png", "x.svg", "b/y.svg", "README", ".hidden")
    touch(tmp_path / "other", "c.png", "deep/d.png")
    (tmp_path / "pictures" / "link").symlink_to(tmp_path / "other")
    found = find_images(tmp_path / "pictures")
    assert (found.images, found.ignored, found.links) == (["a.png"], {".svg": 2, "": 1}, 1)


def test_links_are_followed_once(tmp_path):
    touch(tmp_path / "pictures", "a.png", "b/c.png")
    touch(tmp_path / "other", "d.png", "deep/e.png")
    links = {"1": tmp_path / "other" / "deep", "2": tmp_path, "3": tmp_path / "pictures" / "b"}
    for name, target in links.items():
        (tmp_path / "pictures" / name).symlink_to(target)
    (tmp_path / "other" / "back").symlink_to(tmp_path / "pictures")
    found = find_images(tmp_path / "pictures", follow_links=True)
    assert found.images == ["1/e.png", "2/other/d.png", "3/c.png", "a.png"] and found.links == 0


@pytest.mark.parametrize(("name", "white"), [("x.png", 65535), ("x.tif", 65535), ("f.tif", 1.0), ("g.tif", 255.0)])
def test_grey_of_more_than_8_bits_is_scaled(tmp_path, name, white):
    levels = np.array([[0, 0.25], [0.5, 1]]) * white
    Image.fromarray(levels.astype(np.uint16 if white == 65535 else np.float32)).save(tmp_path / name)
    read = np.asarray(read_image(tmp_path / name))
    assert read.shape == (2, 2, 3)
    assert np.abs(read[..., 0] - np.array([[0, 0.25], [0.5, 1]]) * 255).max() <= 0.5


@pytest.mark.parametrize("value", [-0.5, 300.0, np.nan])
def test_grey_of_no_known_range_is_refused(tmp_path, value):
    Image.fromarray(np.array([[0.5, value]], np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="of no known range"):
        read_image(tmp_path / "x.tif")


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


def test_formats_that_are_not_read_have_a_remedy(tmp_path):
    """By the suffix in a folder, by the content of a file: phones write HEIC that is named .jpg."""
    (tmp_path / "a.HEIC").touch()
    with pytest.raises(
        ValmError, match=r"no images in .*; HEIC is not read: convert it to JPEG, such as by ImageMagick"
    ):
        find_images(tmp_path)
    heic, svg = b"\0\0\0\x24ftypheic\0\0\0\0mif1", b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'
    for content, remedy in ((heic, "it is HEIC, convert it to JPEG"), (svg, "it is SVG, draw it as PNG")):
        (tmp_path / "a.jpg").write_bytes(content)
        for source in (io.BytesIO(content), tmp_path / "a.jpg"):
            with pytest.raises(ValueError, match=f"not a picture in one of the formats JPEG, .*: {remedy}"):
                read_image(source)
