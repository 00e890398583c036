"""Reads an image: its formats, its limits, and the conversion of transparency, orientation and grey levels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

# The supported formats, with their suffixes. Pillow detects a format by content, and would run Ghostscript on
# PostScript.
SUFFIXES_OF = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm",),
    # Pillow may be built without AVIF
    **({"AVIF": (".avif",)} if features.check("avif") else {}),
    **({"JPEG2000": (".jp2", ".j2k")} if features.check("jpg_2000") else {}),
}
IMAGE_FORMATS = tuple(SUFFIXES_OF)
IMAGE_SUFFIXES = {suffix for suffixes in SUFFIXES_OF.values() for suffix in suffixes}

# Common unsupported formats, and what to do with them.
UNREAD_SUFFIXES = {".heic": "HEIC", ".heif": "HEIC", ".hif": "HEIC", ".svg": "SVG", ".svgz": "SVG"}
REMEDIES = {
    "HEIC": "convert it to JPEG, such as by ImageMagick: magick NAME.heic NAME.jpg",
    "SVG": "convert it to PNG, such as by librsvg: rsvg-convert NAME.svg -o NAME.png",
}

# The brands in the content of a HEIC file.
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# An image of more pixels is rejected before it is decoded: a file of a few kilobytes can claim gigabytes.
MAX_PIXELS = 1 << 26
# An image with a larger aspect ratio is rejected too: CLIP scales the shorter side to its own size.
MAX_ASPECT = 64


def unread_formats(suffixes: Iterable[str]) -> list[str]:
    """What to do with each unsupported format among the files with these `suffixes`."""
    names = sorted({UNREAD_SUFFIXES[suffix] for suffix in suffixes if suffix in UNREAD_SUFFIXES})
    return [f"{name} is not read: {REMEDIES[name]}" for name in names]


def read_image(source: str | os.PathLike | BinaryIO | Image.Image) -> Image.Image:
    """The image in RGB, upright (EXIF orientation applied), with white behind transparent pixels.

    16-bit grey is scaled from 0..65535. Float grey is scaled from 0..1, or from 0..255 if there are values above 1.
    Grey of 32-bit integers is scaled from 0..255, or from 0..65535 if there are values above 255.

    Raises:
        ValueError: grey levels of another range, more than MAX_PIXELS, one side more than MAX_ASPECT times the other,
            or a format that is not in IMAGE_FORMATS.
        Exception: whatever Pillow raises for an image that it cannot read.
    """
    with nullcontext(source) if isinstance(source, Image.Image) else open_image(source) as image:
        check_size(image)
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _in_8_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def open_image(source: str | os.PathLike | BinaryIO) -> Image.Image:
    """The image in a file; only its header is read.

    Raises:
        ValueError: a format that is not in IMAGE_FORMATS.
        Exception: as in `read_image`.
    """
    with warnings.catch_warnings():
        # Pillow warns at its own limit, after the header; our limit is lower and raises
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(source, formats=IMAGE_FORMATS)
        except UnidentifiedImageError as error:  # Pillow's message contains an object's address
            remedy = "".join(f": it is {name}, {REMEDIES[name]}" for name in _unread_format(source))
            raise ValueError(f"not a picture in one of the formats {', '.join(IMAGE_FORMATS)}{remedy}") from error
    return image


def check_size(image: Image.Image) -> None:
    """Raises ValueError for more than MAX_PIXELS, or one side more than MAX_ASPECT times the other."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} pixels, one side more than {MAX_ASPECT} times the other")


def _unread_format(source: Any) -> list[str]:
    """The unsupported format (a key of REMEDIES) of a file's content, if it is one."""
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return _unread_format(file)
    source.seek(0)
    begin = source.read(1024)
    if begin[4:8] == b"ftyp" and begin[8:12] in HEIC_BRANDS:
        return ["HEIC"]
    return ["SVG"] if b"<svg" in begin else []


def _in_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16- or 32-bit integers or floats, scaled to 8 bits, with white behind transparent pixels.
    Pillow's conversion would clip, and the transparent level of a PNG has more than 8 bits."""
    levels = np.asarray(image).astype(np.float64)
    low, high = levels.min(), levels.max()
    if image.mode == "F":
        white = 1.0 if high <= 1 else 255.0
    else:  # 32-bit integers do not tell their range either
        white = 255.0 if image.mode == "I" and high <= 255 else 65535.0
    if not (low >= 0 and high <= white):  # false for NaN too
        raise ValueError(f"grey levels from {low:g} to {high:g}, which is not a known range")
    grey = np.rint(levels * (255 / white)).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[levels == transparent] = 255
    return Image.fromarray(grey)
