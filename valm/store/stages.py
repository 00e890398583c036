"""The stages of a long command. Each has a name, is timed, and is skipped if an earlier run finished it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from valm.store.files import read_json, write_json


class Stages:
    """Runs stages and writes the finished stages, with their seconds, to `file`. Printed names begin with `name`."""

    def __init__(self, file: Path, name: str = "", progress: bool = True):
        self.file, self.name, self.progress = file, name, progress
        self.seconds: dict[str, float] = {}
        if file.is_file():
            self.seconds = read_json(file, "the finished stages", dict[str, float], "delete it: all stages run again")

    def __call__(self, stage: str, work: Callable[[], object], title: str | None = None) -> None:
        """Calls `work` unless `stage` is finished. A stage that was killed is called again, and resumes or restarts.

        Args:
            work: if it returns a text, the text is printed after the time.
            title: printed instead of the name `stage`.
        """
        shown = f"{self.name}{title or stage}"
        if stage in self.seconds:
            self._say(f"{shown}: finished before")
            return
        self._say(f"{shown} ...")
        start = time.perf_counter()
        result = work()
        self.seconds[stage] = round(time.perf_counter() - start, 1)
        write_json(self.file, self.seconds)
        more = f"; {result}" if isinstance(result, str) else ""
        self._say(f"{shown}: {duration(self.seconds[stage])}{more}")

    def _say(self, line: str) -> None:
        if self.progress:
            print(line, flush=True)


def duration(seconds: float) -> str:
    """A time for people, such as 12 s, 2.4 min or 1.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
