"""The sizes of the benchmarks: real sizes, or with `--tiny` sizes so small that a test can run every body."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")
# conftest.py sets it before the modules of the benchmarks are imported.
tiny = False


def sized(real: T, small: T) -> T:
    return small if tiny else real
