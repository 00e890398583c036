"""The undecoded images of a source, and how they are encoded."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from valm.errors import ValmError
from valm.options import check_fields, option
from valm.store.files import cannot_read, is_transient
from valm.text import one_line, utf8
from valm_kernels.json_files import check_regular

if TYPE_CHECKING:  # the command line reads the options of `Encoding` before it imports torch
    from PIL import Image

# A larger image in a zip file is not read: 8 bytes for each of the most pixels. A zip file may claim any size.
MAX_MEMBER_BYTES = 1 << 29
ZIP_REMEDY = "Copy or download the zip file again, or unpack it and name the folder"


@dataclass(frozen=True)
class Encoding:
    """How images are decoded and encoded: options of `valm kb build`.

    Attributes:
        workers: number of processes that decode images. None chooses by the number of images and cores, 0 decodes in
            this process.

    Raises:
        ValmError: a number is too small.

    Example:
        >>> from valm.knowledge_base.records import Encoding
        >>> Encoding(thumbnails=0)  # stores no thumbnails
        Encoding(batch_size=64, thumbnails=0, workers=None)
    """

    batch_size: int = option("images that CLIP encodes at once", 64, least=1)
    thumbnails: int = option("longer side of the stored thumbnails, in pixels; 0 stores none", 128, least=0)
    workers: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def plan(self) -> dict[str, int]:
        """The settings that change the result."""
        return {"batch_size": self.batch_size, "thumbnails": self.thumbnails}


@dataclass(frozen=True)
class Record:
    """One image of a source.

    Attributes:
        source: a file, whose image is the whole file, `size` bytes from `offset` (in a tar file) or `member` of `size`
            bytes (in a zip file); or the content of a file, or a PIL image. None is an entry that is listed as skipped.
        reason: why an entry without an image is skipped.
    """

    uri: str
    caption: str
    source: Path | bytes | Image.Image | None
    offset: int = 0
    size: int | None = None
    reason: str = "there is no picture"
    member: str | None = None

    def __post_init__(self) -> None:
        for name in ("uri", "caption"):  # written as UTF-8
            object.__setattr__(self, name, utf8(getattr(self, name)))

    def read(self) -> Image.Image:
        """The image as `read_image` returns it.

        Raises:
            Exception: of any type, if it cannot be read.
        """
        from valm.clip.read_image import read_image

        if self.source is None:
            raise ValueError(self.reason)
        if not isinstance(self.source, Path | bytes):
            return read_image(self.source)
        with self._opened() as file:
            return read_image(io.BytesIO(file.read()))

    def is_image(self) -> bool:
        """Whether a file begins as an image that `read_image` accepts. Its pixels are not decoded.

        Raises:
            OSError: a transient error (`is_transient`).
        """
        from valm.clip.read_image import check_size, open_image

        try:
            with self._opened() as file, open_image(file) as image:
                check_size(image)
        except Exception as error:  # decoders raise many types for damaged bytes
            if is_transient(error):
                raise
            return False
        return True

    def _opened(self) -> BinaryIO:
        """The content of a file, opened."""
        if isinstance(self.source, bytes):
            return io.BytesIO(self.source)
        if not isinstance(self.source, Path) or not self.source.is_file():  # opening a pipe would block
            raise ValueError("it is not a file, or a link that leads to no file")
        if self.member is not None:
            return io.BytesIO(read_member(self.source, self.member, MAX_MEMBER_BYTES))
        if self.size is None:
            return open(self.source, "rb")
        with open(self.source, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))

    def identity(self) -> int | str | None:
        """The size of a file (None if it is missing) or of its part, or a hash of bytes or pixels. Name and identity
        together identify a record.

        Raises:
            ValmError: a transient error (`is_transient`) while a file is looked up.
        """
        if self.source is None or self.size is not None:
            return self.size
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        if not isinstance(self.source, Path):
            return _pixels_sha256(self.source)
        try:
            return self.source.stat().st_size if self.source.is_file() else None
        except OSError as error:  # an impossible path, such as one that is too long, is a damaged record
            if is_transient(error):
                raise cannot_read(self.source, error.strerror) from error
            return None


def open_zip(path: Path) -> zipfile.ZipFile:
    """The zip file `path`. It stays open until another one is opened.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
        ValmError: the file is no zip file or is damaged.
    """
    found = check_regular(path)
    try:
        return _open_zip(path, found.st_mtime_ns, os.getpid())
    except Exception as error:  # zipfile raises many types for damaged bytes
        if is_transient(error):
            raise
        raise ValmError(f"cannot read the zip file {path}: {one_line(str(error))}. {ZIP_REMEDY}") from error


@functools.lru_cache(1)
def _open_zip(path: Path, written: int, process: int) -> zipfile.ZipFile:  # processes would share one position
    return zipfile.ZipFile(path)


def read_member(path: Path, name: str, most: int) -> bytes:
    """The content of a file in a zip file.

    Raises:
        ValmError: it is damaged, encrypted or larger than `most` bytes.
    """
    archive = open_zip(path)
    if archive.getinfo(name).file_size > most:  # zipfile reads no more than this, whatever follows
        raise ValmError(f"a file of more than {most:,} bytes is not read")
    try:
        return archive.read(name)
    except Exception as error:  # each compression raises its own types
        if is_transient(error):
            raise
        raise ValmError(f"{one_line(str(error))}. {ZIP_REMEDY}") from error


def _pixels_sha256(image: Image.Image) -> str:
    """A hash of the pixels of a PIL image, as it is shown."""
    from valm.clip.read_image import read_image

    try:
        shown = read_image(image)
        content = f"{shown.size} ".encode() + shown.tobytes()
    except Exception as error:  # decoders raise many types for damaged bytes; the image will be skipped
        content = str(error).encode()
    return hashlib.sha256(content).hexdigest()


def fingerprint_records(records: Iterable[Record]) -> str:
    """SHA-256 over the names, captions and identities of the images in `records`."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.uri, record.caption, record.identity()]).encode())
    return digest.hexdigest()


def written_since(files: Iterable[Path], since: float) -> Path | None:
    """The first of `files` that was written after `since` (seconds since 1970), or None."""
    now = time.time()
    for file in files:
        try:
            written = file.stat().st_mtime
        except OSError:  # a damaged record, as for `Record.identity`
            continue
        if since < written <= now:  # a time in the future, as in some archives, is ignored
            return file
    return None
