import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from valm.clip import read_image as reading
from valm.clip.read_image import IMAGE_SUFFIXES, read_image


@pytest.mark.parametrize(
    ("name", "white", "dtype"),
    [
        ("x.png", 65535, np.uint16),
        ("x.tif", 65535, np.uint16),
        ("i.tif", 65535, np.int32),
        ("j.tif", 255, np.int32),
        ("f.tif", 1, np.float32),
        ("g.tif", 255, np.float32),
    ],
)
def test_grey_of_more_than_8_bits_is_scaled(tmp_path, name, white, dtype):
    levels = np.array([[0, 0.2], [0.6, 1]])
    Image.fromarray((levels * white).round(4).astype(dtype)).save(tmp_path / name)
    read = np.asarray(read_image(tmp_path / name))
    assert read.shape == (2, 2, 3)
    assert np.abs(read[..., 0] - levels * 255).max() <= 0.5


@pytest.mark.parametrize("value", [-0.5, 300.0, np.nan])
def test_grey_of_no_known_range_is_refused(tmp_path, value):
    Image.fromarray(np.array([[0.5, value]], np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="which is not a known range"):
        read_image(tmp_path / "x.tif")


def test_transparent_pixels_become_white(tmp_path):
    for mode, save in (("RGBA", {}), ("P", {"transparency": 0})):
        picture = Image.new(mode, (4, 4), 0)
        picture.save(tmp_path / "x.png", **save)
        assert read_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_level_of_16_bits_becomes_white(tmp_path):
    """Also where another level has the same 8 bits."""
    levels = np.array([[30000, 30001], [0, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.png", transparency=30000)
    assert np.asarray(read_image(tmp_path / "x.png"))[..., 0].tolist() == [[255, 117], [0, 255]]


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
    monkeypatch.setattr(reading, "MAX_PIXELS", 100)
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
