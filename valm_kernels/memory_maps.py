"""Hints to the system for reading memory maps that are larger than memory."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

CGROUPS = Path("/sys/fs/cgroup")
# A map larger than this share of memory is not expected to stay in it. A smaller map gets into memory sooner if the
# system also reads the neighbouring pages.
SHARE = 0.5


def exceeds_memory(nbytes: int) -> bool:
    """Whether a map is too large to stay in memory, so that `read_at_random` helps random access."""
    return nbytes > SHARE * memory_limit()


def memory_limit(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of memory that this process may use, page cache included: the machine's, or less in a container."""
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError):  # Windows has no sysconf, and not every system knows these names
        return sys.maxsize
    try:
        lines = own.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return limits[0]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            # a container's own group may be mounted as the root
            with suppress(OSError, ValueError):  # there is none, or "max"
                limits.append(int((folder / name).read_text()))
            if folder == root:
                break
    return min(limits)


def read_at_random(array: np.ndarray) -> None:
    """Tells the system that a memory-mapped array is read at random: it then reads only the pages of the rows, not up
    to megabytes after each. This affects only speed."""
    if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
        start = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise()(start, array.ctypes.data + array.nbytes - start, mmap.MADV_RANDOM)


def read_ahead(array: np.ndarray, rows: np.ndarray) -> None:
    """Tells the system that these rows (n,) int64 of a memory-mapped array are read next. It starts to read all their
    pages, while threads that touch the rows would wait for one page after the other."""
    if not hasattr(mmap, "MADV_WILLNEED"):  # Windows
        return
    madvise, size = _madvise(), array.strides[0]
    starts = array.ctypes.data + rows * size
    pages = starts & -mmap.PAGESIZE
    for page, nbytes in zip(pages.tolist(), (starts + size - pages).tolist(), strict=True):
        madvise(page, nbytes, mmap.MADV_WILLNEED)


@functools.cache
def _madvise() -> Any:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
