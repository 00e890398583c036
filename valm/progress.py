"""Progress bars that suit what they are written to: a terminal, or a log."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

# Seconds between two lines of a log.
LOG_INTERVAL = 30.0


class _Bar(tqdm):
    """Without the thread that redraws bars that have slowed down: each step looks at the clock (`miniters`), and where
    there is no memory for a new thread Python would wait for it forever."""

    monitor_interval = 0


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> Any:
    """A `tqdm` with `options`, on stderr. Where that is no terminal, it is a plain line every LOG_INTERVAL seconds and
    one at the end, without carriage returns.

    shown: False for none; TQDM_DISABLE=1 in the environment hides all, as `valm --quiet` does.
    """
    disabled = not shown or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    if sys.stderr.isatty():
        return _Bar(iterable, disable=disabled, miniters=1, **options)
    plain: dict[str, Any] = {"mininterval": LOG_INTERVAL, "miniters": 1, "leave": True, "ncols": 100, "ascii": " #"}
    return _Bar(iterable, disable=disabled, file=_Lines(sys.stderr), **{**options, **plain})


class _Lines:
    """Writes what tqdm draws over itself as lines of their own."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()
