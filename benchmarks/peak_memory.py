"""Peak memory of a call on CPU, measured in a fresh process: how far the resident set rises above its level before.

The kernel counts pages, so memory that was asked for and never touched does not count, and what the call returns does.
The measured call is the second one: code, threads and libraries are there by then. What the first one's memory left in
the allocator is handed back before (malloc_trim), or the second would use it again unseen.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_mb(build: Callable[..., Callable[[], Any]], *arguments: Any) -> float | None:
    """MB by which build(*arguments)(), called in a process of its own, raises the resident set; None off Linux.

    build is a function of a module, its arguments can be pickled, and what it returns holds the inputs already.
    """
    if not _CLEAR_REFS.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_rise, torch.get_num_threads(), build, *arguments).result()


def _rise(threads: int, build: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    torch.set_num_threads(threads)
    function = build(*arguments)
    function()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")  # the peak starts anew from the present level
    before = _resident_kb("VmRSS")
    result = function()
    rise = _resident_kb("VmHWM") - before
    del result
    return rise * 1024 / 1e6


def _resident_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
