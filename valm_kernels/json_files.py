"""Reads JSON files, and checks that a folder's files belong to it."""

from __future__ import annotations

import errno
import inspect
import json
import os
import stat
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

SHOWN_CHARACTERS = 60


def read_json(path: Path) -> Any:
    """The JSON value in the file `path`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error


def read_measured(path: Path, kind: type) -> list[Any]:
    """The list in the file `path`, which `make gpu-check` writes: its entries are of the TypedDict `kind`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, or has another form; the message names it.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} must contain a list, as make gpu-check writes it, but contains {short(entries)}")
    for n, entry in enumerate(entries):
        for name, hint in get_type_hints(kind).items():
            found = entry.get(name, "missing") if isinstance(entry, dict) else entry
            if not (found in get_args(hint) if get_origin(hint) is Literal else isinstance(found, hint)):
                expected = inspect.formatannotation(hint)
                raise ValueError(f"{path}: {name} of entry {n} must be {expected}, but is {short(found)}")
    return entries


def check_own(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a file or folder that belongs to its parent folder.

    A link may lead to another file of that folder. In a snapshot of the Hugging Face Hub's cache, a link may lead to a
    blob of that cache.

    Raises:
        OSError: there is no such file, a link leads elsewhere, or `check_regular` raises it.
    """
    if stat.S_ISLNK(os.lstat(path).st_mode):
        folder, target = os.path.realpath(os.path.dirname(path)), os.path.realpath(path)
        if os.path.commonpath([folder, target]) != folder and os.path.dirname(target) != _blobs(folder):
            reason = "this is a link that leads out of its folder; copy what it leads to instead"
            raise PermissionError(errno.EPERM, reason, os.fspath(path))
    return check_regular(path)


def _blobs(folder: str) -> str | None:
    """The blobs of the Hub's cache, if `folder` is in one of its snapshots (CACHE/snapshots/REVISION)."""
    before, snapshots, _ = folder.rpartition(f"{os.sep}snapshots{os.sep}")
    return os.path.join(before, "blobs") if snapshots else None


def check_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a regular file or folder, following links.

    Raises:
        OSError: there is no such file, or it is a pipe, a socket or a device, whose reading may never end.
    """
    found = os.stat(path)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise PermissionError(errno.EPERM, "this is not a regular file", os.fspath(path))
    return found


def short(value: Any) -> str:
    """A value for an error message, on one line, shortened if long."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    shown = ascii(value) if isinstance(value, str) else repr(value)
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}..."
