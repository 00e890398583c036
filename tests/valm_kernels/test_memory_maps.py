import ctypes
import mmap
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from valm_kernels.memory_maps import memory_limit, read_ahead, read_at_random

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
V1 = "5:cpu:/jobs\n4:memory:/jobs/one\n0::/\n"
V2 = "0::/jobs/one\n"


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="no cgroups on Windows")
@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        (V1, {"memory/jobs/one/memory.limit_in_bytes": "4096\n", "memory/memory.limit_in_bytes": f"{1 << 63}\n"}, 4096),
        (V1, {"memory/jobs/memory.limit_in_bytes": "8192\n"}, 8192),  # of the group around its own
        (V1, {"memory/memory.limit_in_bytes": "4096\n"}, 4096),  # in a container
        (V1, {"memory.max": "4096\n"}, 4096),
        (V2, {"jobs/one/memory.max": "max\n", "jobs/memory.max": "4096\n"}, 4096),
        (V2, {"jobs/one/memory.max": "8192\n", "jobs/memory.max": "4096\n"}, 4096),
        ("0::/caf\udce9\n", {"memory.max": "4096\n"}, 4096),  # not UTF-8
        (V2, {"other/memory.max": "4096\n"}, MACHINE),
        (V2, {}, MACHINE),
        (None, {"memory.max": "4096\n"}, MACHINE),
    ],
)
def test_the_limit_is_the_least_of_the_machine_and_the_groups(tmp_path, own, files, limit):
    for name, content in files.items():
        file = tmp_path / "cgroups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    if own is not None:
        (tmp_path / "own").write_text(own, errors="surrogateescape")
    assert memory_limit(tmp_path / "cgroups", tmp_path / "own") == limit


def advised(array: np.ndarray) -> bool:
    """Whether the map that has the first byte of `array` is read at random."""
    begin = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(number, 16) for number in first.split("-"))
            begin = start <= array.ctypes.data < end
        elif begin and first == "VmFlags:":
            return "rr" in line.split()
    raise AssertionError("no such map")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux lists its maps")
def test_a_map_is_read_at_random(tmp_path):
    file = tmp_path / "numbers"
    file.write_bytes(bytes(3 * mmap.PAGESIZE))
    array, other = np.memmap(file, np.uint8, "r", offset=100), np.memmap(file, np.uint8, "r")
    read_at_random(array)
    assert advised(array) and not advised(other)


def resident(array: np.ndarray) -> list[int]:
    """The pages of a map that are in memory."""
    found = (ctypes.c_ubyte * (array.nbytes // mmap.PAGESIZE))()
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert mincore(array.ctypes.data, array.nbytes, found) == 0
    return [page for page, state in enumerate(found) if state & 1]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="drops the file from the page cache")
def test_rows_read_ahead_are_in_memory_soon_and_alone(tmp_path):
    pages, header, width = 64, 128, mmap.PAGESIZE // 4
    file = tmp_path / "rows"
    with file.open("wb") as opened:
        opened.write(os.urandom(pages * mmap.PAGESIZE))  # a file system would read more of what it has compressed
        opened.flush()
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    everything = np.memmap(file, np.uint8, "r")
    if resident(everything):
        pytest.skip("a file system in memory")
    read_at_random(everything)
    rows = everything[header:-width]
    read_ahead(rows[: len(rows) // width * width].reshape(-1, width), np.array([0, 4 * 20 + 3, 4 * 40, 4 * 62]))
    end = time.monotonic() + 10
    while len(resident(everything)) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    assert resident(everything) == [0, 20, 21, 40, 62]  # the second row crosses into the next page
