import errno
import io
import os

import numpy as np
import pytest
from PIL import Image

from tests.valm.knowledge_base.inputs import touch
from valm.clip.read_image import read_image
from valm.errors import ValmError
from valm.knowledge_base.images import find_images, thumbnail_bytes


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
    touch(tmp_path, "a.png", "x.svg", "b/y.svg", "README", ".hidden")
    found = find_images(tmp_path)
    assert (found.images, found.ignored) == (["a.png"], {".svg": 2, "": 1})


def test_links_are_followed_once(tmp_path):
    """A folder has its own name, whatever links to it."""
    touch(tmp_path / "pictures", "a.png", "b/c.png")
    touch(tmp_path / "other", "d.png", "deep/e.png")
    links = {"1": tmp_path / "other" / "deep", "2": tmp_path, "3": tmp_path / "pictures" / "b"}
    for name, target in links.items():
        (tmp_path / "pictures" / name).symlink_to(target)
    (tmp_path / "other" / "back").symlink_to(tmp_path / "pictures")
    assert find_images(tmp_path / "pictures").images == ["1/e.png", "2/other/d.png", "a.png", "b/c.png"]


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
    with pytest.raises(OSError, match=r"Input/output error: .*/b"):
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
