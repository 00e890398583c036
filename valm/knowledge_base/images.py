"""Image files: listing those of a folder, and making small ones."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from valm.clip.read_image import IMAGE_SUFFIXES, unread_formats
from valm.errors import ValmError
from valm.store.files import exists, files_below, is_folder


@dataclass
class FolderContent:
    """The content of a folder of images.

    images: sorted paths relative to it, with forward slashes. ignored: number of other files, by suffix.
    """

    images: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def find_images(folder: Path) -> FolderContent:
    """All images under `folder`: the files with one of IMAGE_SUFFIXES, as `files_below` finds them.

    Raises:
        OSError: a folder below it cannot be read.
        ValmError: the folder is missing or has no image.
    """
    if not is_folder(folder):
        raise ValmError(f"no folder {folder}" if not exists(folder) else f"{folder} is not a folder")

    found = FolderContent()
    for name in files_below(folder):
        suffix = Path(name).suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            found.images.append(name)
        else:
            found.ignored[suffix] += 1
    if not found.images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        unread = "".join(f"; {remark}" for remark in unread_formats(found.ignored))
        raise ValmError(
            f"no images in {folder}; looked for files ending in {suffixes}, in folders below it too{unread}"
        )
    return found


def thumbnail_bytes(image: Image.Image, size: int) -> bytes:
    """A JPEG of the image whose longer side is at most `size` pixels."""
    small = image.copy()
    small.thumbnail((size, size))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
