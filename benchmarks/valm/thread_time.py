"""Processor time of one thread, for comparisons on a machine that is busy with other work."""

from __future__ import annotations

import time
from collections.abc import Callable


def thread_seconds(function: Callable[[], object], rounds: int = 2) -> float:
    """The least seconds of `rounds` calls; give PyTorch and faiss one thread before."""
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return min(times)
