"""Exact top-K inner product search on CUDA devices: calls csrc/topk/cuda/kernel.cuh on torch's current stream. If the
native code was built without CUDA, matmul.py searches in PyTorch.

The host never waits for the device and all memory comes from torch, so a search can be captured in a CUDA graph. The
tests run the kernels without a GPU, as plain C++: tests/csrc/topk/cuda/.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..native import native
from . import matmul
from .cpu import DTYPE_NAMES
from .result import topk_of_each

# The kernels load 16 bytes at once: 16 elements of int8 rows. Other dtypes are padded alike.
DIM_MULTIPLE = 16
# Bounds the workspace, which grows by about 2 E bytes + 8 KiB a query, for k above 128 by 12 KiB more.
QUERIES_PER_LAUNCH = 1 << 14


def has_code(device: torch.device) -> bool:
    """Whether the native module is built and contains code for this device."""
    try:
        module = native()
    except ImportError:
        return False
    if not module.built_with_cuda or device.type != "cuda":
        return bool(module.built_with_cuda)
    if not _driver_takes_it():
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return bool(10 * major + minor >= module.oldest_capability)


@cache
def _driver_takes_it() -> bool:
    """Whether the driver runs the native module's CUDA runtime, which may be newer than torch's. Warns if not."""
    try:
        native().cuda_devices()
    except RuntimeError as error:
        warnings.warn(
            f"the native CUDA code of valm_kernels cannot run ({error}), so PyTorch's matrix products search instead. "
            "Build it again with a CUDA toolkit that is no newer than the driver.",
            stacklevel=4,
        )
        return False
    return True


def code() -> ModuleType:
    """The native module.

    Raises:
        ImportError: the native module contains no CUDA code.
    """
    module = native()
    if not module.built_with_cuda:
        raise ImportError(
            "the native code of valm_kernels was built without CUDA: put nvcc on the PATH and build it again, or "
            "choose impl='auto', which searches in PyTorch"
        )
    return module


def free_memory(device: torch.device) -> int:
    """Bytes available to new tensors: free on the device or cached by torch."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def aligned(values: Tensor) -> Tensor:
    """(N, E) as the kernels read it: contiguous, 16-byte aligned, E padded with zeros to a multiple of 16. The padding
    changes no score. Copies only if needed.
    """
    missing = -values.shape[1] % DIM_MULTIPLE
    if missing:
        return torch.nn.functional.pad(values, (0, missing))
    values = values.contiguous()
    return values if values.data_ptr() % 16 == 0 else values.clone()


class RowNorms(NamedTuple):
    """An upper bound of each row's norm: norms (N,) float32, NaN for a row that is not finite."""

    norms: Tensor


def pack(rows: Tensor, row_scale: Tensor | None) -> RowNorms:
    """The norms of rows (N, E)."""
    return RowNorms((row_norms if has_code(rows.device) else matmul.row_norms)(rows, row_scale))


def row_norms(rows: Tensor, row_scale: Tensor | None) -> Tensor:
    """The norms of rows (N, E). Marks rows that are not finite, because raising an error would wait for the device."""
    rows = aligned(rows)
    norms = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    stream = torch.cuda.current_stream(rows.device).cuda_stream
    with torch.cuda.device(rows.device):
        code().cuda_row_norms(rows.device.index, _native_rows(rows, row_scale), norms.data_ptr(), stream)
    return norms


def search(
    queries: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    packed: RowNorms | None,
    k: int,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best rows (N, E) of each query (Q, E) by (score falling, index rising): scores and indices, both (Q, k).

    `packed` comes from `pack`; if it is None, the search computes the norms. A row that is not finite, or that allowed
    (N,) bool excludes, is never returned. Results are padded with score −inf and index −1. A query that is not finite
    gets scores NaN and indices −1. Float databases (n, N, E) with queries (n, Q, E) are searched one after the other.
    """
    if rows.dim() == 3:
        return topk_of_each(lambda some, database: search(some, database, None, None, k), queries, rows)
    queries, rows = aligned(queries.float()), aligned(rows)
    (norms,) = pack(rows, row_scale) if packed is None else packed
    if not has_code(rows.device):
        return matmul.search(queries, rows, row_scale, norms, k, allowed)
    if allowed is not None:
        norms = norms.masked_fill(~allowed, torch.nan)
    scores = torch.empty(queries.shape[0], k, dtype=torch.float32, device=rows.device)
    indices = torch.empty(queries.shape[0], k, dtype=torch.int64, device=rows.device)
    device, native_rows = rows.device.index, _native_rows(rows, row_scale)
    stream = torch.cuda.current_stream(rows.device).cuda_stream
    for start in range(0, queries.shape[0], QUERIES_PER_LAUNCH):
        part = slice(start, start + QUERIES_PER_LAUNCH)
        count = queries[part].shape[0]
        workspace = torch.empty(
            code().cuda_topk_workspace(device, count, native_rows, k), dtype=torch.uint8, device=rows.device
        )
        with torch.cuda.device(rows.device):
            code().ip_topk_cuda(
                device,
                queries[part].data_ptr(),
                count,
                native_rows,
                norms.data_ptr(),
                k,
                workspace.data_ptr(),
                scores[part].data_ptr(),
                indices[part].data_ptr(),
                stream,
            )
    return scores, indices


def _native_rows(rows: Tensor, row_scale: Tensor | None) -> Any:
    scale = 0 if row_scale is None else row_scale.data_ptr()
    return code().Rows(rows.data_ptr(), scale, DTYPE_NAMES[rows.dtype], *rows.shape)
