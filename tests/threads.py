"""Runs the same code in several threads at once, and PyTorch in some number of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

THREADS = 4


def at_once(*calls: Callable[[], object]) -> list[object]:
    """What the calls return, each in a thread of its own, all begun together."""
    start = threading.Barrier(len(calls))

    def begin(call: Callable[[], object]) -> object:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(begin, call) for call in calls]]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch has this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
