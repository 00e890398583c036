"""Runs code in several threads at once, and PyTorch with a given number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

THREADS = 4


def at_once(*calls: Callable[[], object]) -> list[object]:
    """The results of the calls, each in its own thread, all started together."""
    start = threading.Barrier(len(calls))

    def begin(call: Callable[[], object]) -> object:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(begin, call) for call in calls]]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Lets PyTorch use this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
