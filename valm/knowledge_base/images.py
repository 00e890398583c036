"""Image files: which there are in a folder, and how one is read."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from valm.errors import ValmError
from valm.files import cannot_read

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
# The formats of these. Pillow goes by the content whatever the name, and would hand PostScript to Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# An image of more pixels is refused before it is decoded: a file of a few kilobytes can claim gigabytes.
MAX_PIXELS = 1 << 26
# So is one whose sides are further apart: CLIP enlarges the shorter one to its own size, and the longer one with it.
MAX_ASPECT = 64


def find_images(folder: Path) -> list[str]:
    """Paths of all images under `folder`, relative to it, with forward slashes and in sorted order.

    An image is a file with one of IMAGE_SUFFIXES. Hidden files and folders are skipped, links to folders are not
    followed. Raises ValmError where the folder is missing or has no image, or a folder below it cannot be read.
    """
    if not folder.is_dir():
        raise ValmError(f"no folder {folder}" if not folder.exists() else f"{folder} is not a folder")

    def unreadable(error: OSError) -> None:
        raise cannot_read(f"the folder {error.filename}", error.strerror) from error

    found = []
    for directory, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                found.append((Path(directory) / name).relative_to(folder).as_posix())
    if not found:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValmError(f"no pictures in {folder}; looked for files ending in {suffixes}, in folders below it too")
    return sorted(found)


def read_image(source: str | os.PathLike | BinaryIO | Image.Image) -> Image.Image:
    """The image in RGB, upright (EXIF orientation applied), on white where it is transparent.

    Raises ValueError for an image of more than MAX_PIXELS, with one side more than MAX_ASPECT times the other, or in
    none of IMAGE_FORMATS; and whatever Pillow raises for one it cannot read.
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
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def thumbnail_bytes(image: Image.Image, size: int) -> bytes:
    """A JPEG of the image whose longer side is at most `size` pixels."""
    small = image.copy()
    small.thumbnail((size, size))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
