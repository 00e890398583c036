"""Progress of sharded work, reported by each shard while it is written, and shown as one progress bar."""

from __future__ import annotations

from typing import Protocol

from valm.progress import progress_bar


class Progress(Protocol):
    """Receives the progress of a shard."""

    def begin(self, units: int) -> None:
        """Reports that a shard of this many units of work was begun."""

    def advance(self, units: int, skipped: int = 0) -> None:
        """Reports that this many more units are done, of which `skipped` could not be read."""


class ProgressBar:
    """Rate and time left over `shards` shards (None = unknown), whose sizes are known only once they begin: the total
    is estimated from those begun so far."""

    def __init__(self, description: str, unit: str, shards: int | None, shown: bool):
        self.shards = shards
        self._begun = self._expected = self._skipped = 0
        self._bar = progress_bar(desc=description, unit=unit, unit_scale=True, shown=shown)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, units: int) -> None:
        self._begun += 1
        self._expected += units
        if self.shards is not None:
            self._bar.total = round(self._expected * self.shards / self._begun)

    def advance(self, units: int, skipped: int = 0) -> None:
        self._skipped += skipped
        if self._skipped:
            self._bar.set_postfix(skipped=self._skipped, refresh=False)
        self._bar.update(units)
