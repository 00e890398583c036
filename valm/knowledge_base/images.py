"""Image files: which there are in a folder, and how one is read."""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from valm.errors import ValmError
from valm.files import cannot_read

# Each format that is read, with its suffixes. Pillow goes by the content whatever the name, and would hand PostScript
# to Ghostscript.
SUFFIXES_OF = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm",),
    # which a Pillow may have been built without
    **({"AVIF": (".avif",)} if features.check("avif") else {}),
    **({"JPEG2000": (".jp2", ".j2k")} if features.check("jpg_2000") else {}),
}
IMAGE_FORMATS = tuple(SUFFIXES_OF)
IMAGE_SUFFIXES = {suffix for suffixes in SUFFIXES_OF.values() for suffix in suffixes}

# An image of more pixels is refused before it is decoded: a file of a few kilobytes can claim gigabytes.
MAX_PIXELS = 1 << 26
# So is one whose sides are further apart: CLIP enlarges the shorter one to its own size, and the longer one with it.
MAX_ASPECT = 64


@dataclass
class FolderContent:
    """What is in a folder of images.

    images: paths relative to it, with forward slashes and sorted. ignored: how many other files it has, by suffix.
    links: linked folders that were not followed.
    """

    images: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    links: int = 0


def find_images(folder: Path, follow_links: bool = False) -> FolderContent:
    """All images under `folder`: the files with one of IMAGE_SUFFIXES.

    Hidden files and folders are skipped. follow_links: also look into linked folders, each once.
    Raises ValmError where the folder is missing or has no image, or a folder below it cannot be read.
    """
    if not folder.is_dir():
        raise ValmError(f"no folder {folder}" if not folder.exists() else f"{folder} is not a folder")

    def unreadable(error: OSError) -> None:
        raise cannot_read(f"the folder {error.filename}", error.strerror) from error

    found = FolderContent()
    visited: set[Path] = set()
    for directory, folders, files in os.walk(folder, onerror=unreadable, followlinks=follow_links):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if follow_links:
            target = Path(directory).resolve()
            if target in visited:  # through another link, or in a circle
                folders.clear()
                continue
            visited.add(target)
        else:
            found.links += sum((Path(directory) / name).is_symlink() for name in folders)
        for name in files:
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES:
                found.images.append((Path(directory) / name).relative_to(folder).as_posix())
            else:
                found.ignored[suffix] += 1
    if not found.images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValmError(f"no pictures in {folder}; looked for files ending in {suffixes}, in folders below it too")
    found.images.sort()
    return found


def read_image(source: str | os.PathLike | BinaryIO | Image.Image) -> Image.Image:
    """The image in RGB, upright (EXIF orientation applied), on white where it is transparent.

    Grey of 16 bits is scaled from 0 to 65535, of floats from 0 to 1 or, where there are larger ones, to 255.
    Raises ValueError for grey levels of another range, for an image of more than MAX_PIXELS, with one side more than
    MAX_ASPECT times the other, or in none of IMAGE_FORMATS; and whatever Pillow raises for one it cannot read.
    """
    with warnings.catch_warnings():
        # Pillow warns at a limit of its own, after the header; ours is lower and refuses.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = source if isinstance(source, Image.Image) else Image.open(source, formats=IMAGE_FORMATS)
        except UnidentifiedImageError as error:  # its own message has an object's address in it
            raise ValueError(f"not a picture in one of the formats {', '.join(IMAGE_FORMATS)}") from error
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"{width} x {height} pixels, one side more than {MAX_ASPECT} times the other")
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _in_8_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of integers of 16 or 32 bits, or of floats, in 8 bits. Pillow's own conversion cuts off."""
    levels = np.asarray(image).astype(np.float64)
    low, high = levels.min(), levels.max()
    if image.mode == "F":
        white = 1.0 if high <= 1 else 255.0
    else:
        white = 65535.0
    if not (low >= 0 and high <= white):  # nor for NaN
        raise ValueError(f"grey levels from {low:g} to {high:g}, of no known range")
    return Image.fromarray(np.rint(levels * (255 / white)).astype(np.uint8))


def thumbnail_bytes(image: Image.Image, size: int) -> bytes:
    """A JPEG of the image whose longer side is at most `size` pixels."""
    small = image.copy()
    small.thumbnail((size, size))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
