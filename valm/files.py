"""JSON files, output folders, and what an error says of a file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from valm.errors import ValmError
from valm_kernels import atomic_files, json_files

# An OSError of what is in a file: Pillow's have no number, and a damaged archive or dataset leads to a place or a name
# that cannot be. All others are of the drive, the memory, permissions, open files.
CONTENT_ERRORS = (None, errno.EINVAL, errno.ENAMETOOLONG)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """As in `valm_kernels.atomic_files`. Raises ValmError, which names `path`, for a full disk and the like."""
    with write_errors(path), atomic_files.atomic_path(path) as temporary:
        yield temporary


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raises ValmError, which names `path`, for an OSError while it is written."""
    try:
        yield
    except OSError as error:
        # numpy has no number for a disk that took only a part, but a sentence without a name
        reason = error.strerror or f"not all of it could be written ({error}); the disk may be full"
        raise ValmError(f"cannot write {path}: {reason}; what was there before is untouched") from error


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, all or nothing. Raises ValmError where it cannot be written."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, what: str, schema: Any, remedy: str = "make it again") -> Any:
    """The JSON value in `path`, as `schema` says (`valm_kernels.json_files`).

    what: what the file is, remedy: what to do where it is damaged; both for the ValmError that is raised for a file
        that cannot be read, or holds something else.
    """
    try:
        return json_files.read_json(path, schema)
    except OSError as error:
        raise ValmError(f"cannot read {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValmError(f"{what} {error}; {remedy}") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def check_regular(path: Path) -> None:
    """Raises ValmError where `path` is no regular file, nor a link to one: a pipe, opened, would wait."""
    try:
        json_files.regular_file(path)
    except OSError as error:
        raise ValmError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValmError(str(error)) from error


def check_all_regular(folder: Path) -> None:
    """`check_regular` for all files in `folder`, which a library will open by names of its own."""
    for path in folder.iterdir():
        if not path.is_dir() and path.exists():
            check_regular(path)


def is_passing(error: BaseException) -> bool:
    """Whether an error is of the machine and not of what is in the file: it says nothing about the next try."""
    return isinstance(error, OSError) and error.errno not in CONTENT_ERRORS


def cannot_read(name: object, reason: object) -> ValmError:
    """The error for a source that is not known to be damaged, but cannot be read now (`is_passing`)."""
    return ValmError(f"cannot read {name}: {reason}; once it can be read, run the same again: it goes on")


def writable_folder(path: str | os.PathLike) -> Path:
    """The folder `path`, made if it is not there. Raises ValmError where nothing can be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValmError(f"cannot make the output folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValmError(f"cannot write into the output folder {path}: permission denied")
    return path
