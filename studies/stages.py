"""The stages of a study. Each has a name, is timed, and is skipped if an earlier run finished it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from valm.store.files import read_json, write_json


class Stages:
    """Runs stages and writes the finished ones, with their seconds, to `file`."""

    def __init__(self, file: Path, name: str = "", progress: bool = True):
        self.file, self.name, self.progress = file, name, progress
        self.seconds: dict[str, float] = {}
        if file.is_file():
            self.seconds = read_json(file, "the finished stages", dict[str, float], "delete it: all stages run again")

    def __call__(self, stage: str, work: Callable[[], object]) -> None:
        """Calls `work` unless `stage` is finished. A stage that was killed is called again, and resumes or restarts."""
        if stage in self.seconds:
            self._say(f"{self.name}{stage}: finished before")
            return
        self._say(f"{self.name}{stage} ...")
        start = time.perf_counter()
        work()
        self.seconds[stage] = round(time.perf_counter() - start, 1)
        write_json(self.file, self.seconds)
        self._say(f"{self.name}{stage}: {self.seconds[stage]:.0f} s")

    def _say(self, line: str) -> None:
        if self.progress:
            print(line, flush=True)
