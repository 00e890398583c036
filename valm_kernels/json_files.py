"""Reads JSON files, and keeps to the files of a folder."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

SHOWN_CHARACTERS = 60


def read_json(path: Path) -> Any:
    """The JSON value in the file `path`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error


def check_own(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a file or folder that belongs to the folder it is in.

    Raises:
        OSError: there is none, or it is a link that leads out of that folder.
    """
    if stat.S_ISLNK(os.lstat(path).st_mode):
        folder = os.path.realpath(os.path.dirname(path))
        if os.path.commonpath([folder, os.path.realpath(path)]) != folder:
            reason = "this is a link that leads out of its folder; copy what it leads to instead"
            raise PermissionError(errno.EPERM, reason, os.fspath(path))
    return os.stat(path)


def short(value: Any) -> str:
    """A value for an error message: on one line, shortened if long."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    shown = ascii(value) if isinstance(value, str) else repr(value)
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}..."
