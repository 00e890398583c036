"""The CUDA kernels of top-K search, compiled by g++ with the shim in shim/ and called like valm_kernels._native."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = HERE.parents[3] / "csrc"
ORDERS = {"rising": 0, "falling": 1, "random": 2}
# Bytes after the workspace, which must not change.
GUARD_BYTES = 256


def build(library: Path, sources: Path = SOURCES, driver: Path = HERE / "driver.cpp") -> Path:
    """Compiles `driver`, and the kernels under `sources` that it includes, into `library`."""
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    # longjmp between the fibers' stacks, which a fortified longjmp would reject
    options += ["-U_FORTIFY_SOURCE"]
    includes = [f"-I{HERE / 'shim'}", f"-I{sources}"]
    command = ["g++", *options, *includes, str(driver), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def copy_sources(folder: Path) -> Path:
    """A copy of the kernels to change before `build`."""
    shutil.copytree(SOURCES / "topk", folder / "topk")
    (folder / "topk" / "cuda" / "device.cuh").unlink()  # the shim's device.cuh replaces it
    return folder


class Rows:
    """Replaces valm_kernels._native.Rows."""

    def __init__(self, data: int, scale: int, dtype: str, count: int, dim: int) -> None:
        element = ("float32", "float16", "bfloat16", "int8").index(dtype)
        pointers = (ctypes.c_void_p(data), ctypes.c_void_p(scale))
        self.arguments = (element, *pointers, ctypes.c_int64(count), ctypes.c_int64(dim))


class Simulator:
    """One device. `order` chooses the next of the waiting threads and blocks; `shared_bytes` is per block."""

    built_with_cuda = True
    Rows = Rows

    def __init__(
        self,
        library: Path,
        order: str = "rising",
        *,
        seed: int = 0,
        multiprocessors: int = 3,
        shared_bytes: int = 166912,
    ) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.workspace_bytes.restype = ctypes.c_int64
        self._schedule = (ORDERS[order], ctypes.c_uint64(seed))
        self._limits = (multiprocessors, ctypes.c_int64(shared_bytes))
        self.redone = 0  # queries of the last search that the exact scan answered
        self.offered = 0  # keys offered to its pools; a key that a full pool rejected counts again
        self.launches = 0  # of kernels

    def _call(self, name: str, *arguments) -> None:
        assert OnDevice.depth > 0, "nothing restores PyTorch's device after the launch"
        message = ctypes.create_string_buffer(200)
        if getattr(self._library, name)(*self._schedule, message, ctypes.c_size_t(200), *arguments):
            raise RuntimeError(message.value.decode())

    def cuda_row_norms(self, device, rows, norms, stream) -> None:
        self._call("row_norms", *rows.arguments, ctypes.c_void_p(norms))

    def cuda_topk_workspace(self, device, n_queries, rows, k) -> int:
        needed = self._library.workspace_bytes(ctypes.c_int64(n_queries), *rows.arguments, k, *self._limits)
        return needed + GUARD_BYTES

    def plan(self, n_queries: int, rows: Rows, k: int) -> tuple[int, ...]:
        """The first pass: 1 if there is one, the queries of a block, the stages, the bytes of shared memory, and 1 if
        the queries stay in device memory. The exact scan: the queries of a block.
        """
        figures = (ctypes.c_int64 * 6)()
        self._library.plan_figures(ctypes.c_int64(n_queries), *rows.arguments, k, *self._limits, figures)
        return tuple(figures)

    def ip_topk_cuda(self, device, queries, n_queries, rows, norms, k, workspace, scores, indices, stream) -> None:
        size = self.cuda_topk_workspace(device, n_queries, rows, k)
        memory = (ctypes.c_uint8 * size).from_address(workspace)
        ctypes.memset(memory, 0xFF, size)
        redone, offered, launches = ctypes.c_int(-1), ctypes.c_int64(-1), ctypes.c_int(-1)
        self._call(
            "search",
            *rows.arguments,
            ctypes.c_void_p(norms),
            ctypes.c_void_p(queries),
            n_queries,
            k,
            *self._limits,
            *map(ctypes.c_void_p, (workspace, scores, indices)),
            ctypes.byref(redone),
            ctypes.byref(offered),
            ctypes.byref(launches),
        )
        assert bytes(memory[-GUARD_BYTES:]) == b"\xff" * GUARD_BYTES, "written beyond the workspace"
        self.redone, self.offered, self.launches = redone.value, offered.value, launches.value


class OnDevice:
    """Replaces torch.cuda.device(device): launches choose a device, and this restores PyTorch's device."""

    depth = 0

    def __init__(self, device: torch.device) -> None:
        pass

    def __enter__(self) -> None:
        OnDevice.depth += 1

    def __exit__(self, *exception: object) -> None:
        OnDevice.depth -= 1


class NoStream:
    """Replaces torch.cuda.current_stream(device) on a machine without CUDA."""

    cuda_stream = 0

    def __init__(self, device: torch.device) -> None:
        pass
