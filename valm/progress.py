"""Progress bars for a terminal or a log."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

# Seconds between two lines of a log.
LOG_INTERVAL = 30.0
# Counts up to here are shown in full: tqdm's unit_scale would make 29 of 29 images 29.0/29.0.
IN_FULL = 99_999


class _Bar(tqdm):
    """A `tqdm` without the thread that redraws slow bars. Every step looks at the clock anyway (`miniters`), and Python
    would wait forever if there were no memory for the thread."""

    monitor_interval = 0

    @property
    def format_dict(self) -> dict[str, Any]:
        found = dict(super().format_dict)
        if max(found["n"], found["total"] or 0) <= IN_FULL:
            found["unit_scale"] = False
        return found


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> Any:
    """A `tqdm` with `options`, on stderr. If stderr is not a terminal, it prints a plain line every LOG_INTERVAL
    seconds and another at the end, without carriage returns. Only one thread may update a bar.

    Args:
        shown: False hides the bar; TQDM_DISABLE=1 in the environment and `valm --quiet` hide all.
    """
    disabled = not shown or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    if sys.stderr.isatty():
        return _Bar(iterable, disable=disabled, miniters=1, **options)
    plain: dict[str, Any] = {"mininterval": LOG_INTERVAL, "miniters": 1, "leave": True, "ncols": 100, "ascii": " #"}
    return _Bar(iterable, disable=disabled, file=_Lines(sys.stderr), **{**options, **plain})


class _Lines:
    """Turns tqdm's redrawn bar into separate lines."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()
