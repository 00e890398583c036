"""Hashes by which a resumed build checks that its source is unchanged."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from valm.errors import ValmError
from valm.knowledge_base.encode import Record
from valm.store.files import cannot_read, is_transient


def fingerprint_files(files: Iterable[Path]) -> str:
    """SHA-256 over the names and sizes of `files`.

    Raises:
        ValmError: a file is missing.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(json.dumps([file.name, file.stat().st_size]).encode())
        except OSError as error:
            raise ValmError(f"cannot read {file}: {error.strerror}") from error
    return digest.hexdigest()


def fingerprint_records(records: Iterable[Record]) -> str:
    """SHA-256 over the names, captions and sizes of the images in `records`.

    Raises:
        ValmError: a transient error (`is_transient`) while a file is looked up.
    """
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.uri, record.caption, _size(record.source)]).encode())
    return digest.hexdigest()


def record_files(records: Iterable[Record]) -> Iterable[Path]:
    """The files of the images in `records`."""
    return (record.source for record in records if isinstance(record.source, Path))


def written_since(files: Iterable[Path], since: float) -> Path | None:
    """The first of `files` that was written after `since`, in seconds since 1970, if there is one."""
    now = time.time()
    for file in files:
        try:
            written = file.stat().st_mtime
        except OSError:  # a damaged record, as for `_size`
            continue
        if since < written <= now:  # a time in the future, as of an archive, says nothing
            return file
    return None


def _size(source: Path | bytes | Image.Image | None) -> int | tuple[int, int] | None:
    """Bytes of a file (None if it does not exist) or of its content; width and height of a PIL image."""
    if source is None:
        return None
    if isinstance(source, bytes):
        return len(source)
    if isinstance(source, Image.Image):
        return source.size
    try:
        return source.stat().st_size if source.is_file() else None
    except OSError as error:  # an impossible path, such as one that is too long, is a damaged record
        if is_transient(error):
            raise cannot_read(source, error.strerror) from error
        return None
