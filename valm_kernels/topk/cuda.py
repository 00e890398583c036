"""Exact top-K inner product search on CUDA devices: csrc/topk/cuda/kernel.cuh, called on torch's current stream; where
the native code has no CUDA part, matmul.py in PyTorch.

The host never waits for the device and all memory comes from torch, so a search can be captured in a CUDA graph. The
tests run the kernels without a GPU, as plain C++: tests/csrc/topk/cuda/.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..native import native
from . import matmul
from .checks import SCAN_VALUES
from .cpu import DTYPE_NAMES
from .result import TopK, merge_topk, topk_of_each

# The kernels load 16 bytes at once: so many elements of int8 rows, and rows of one length for all dtypes.
DIM_MULTIPLE = 16
# Bounds the workspace, which grows by about 2 E + 8 KiB bytes a query, and for k above FIRST_PASS_TOPK by 12 KiB more.
QUERIES_PER_LAUNCH = 1 << 14
# csrc/topk/cuda/plan.hpp: a search for more rows scores all of them exactly.
FIRST_PASS_TOPK = 128
# Rows that the results of a search are expanded to at a time, where rows are equal.
EXPANDED_ROWS = 1 << 22
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def has_code(device: torch.device) -> bool:
    """Whether the native module is there and has code for this device."""
    try:
        module = native()
    except ImportError:
        return False
    if not module.built_with_cuda or device.type != "cuda":
        return bool(module.built_with_cuda)
    major, minor = torch.cuda.get_device_capability(device)
    return bool(10 * major + minor >= module.oldest_capability)


def code() -> ModuleType:
    """The native module.

    Raises:
        ImportError: it has no CUDA code.
    """
    module = native()
    if not module.built_with_cuda:
        raise ImportError(
            "the native code of valm_kernels was built without CUDA: put nvcc on the PATH and build it again, or "
            "choose impl='auto', which then searches in PyTorch"
        )
    return module


def free_memory(device: torch.device) -> int:
    """Bytes available to new tensors: free on the device or cached by torch."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def aligned(values: Tensor) -> Tensor:
    """(N, E) as the kernels read it: contiguous, 16-byte aligned, E padded with zeros to a multiple of 16 (which
    changes no score). Copies only if needed.
    """
    missing = -values.shape[1] % DIM_MULTIPLE
    if missing:
        return torch.nn.functional.pad(values, (0, missing))
    values = values.contiguous()
    return values if values.data_ptr() % 16 == 0 else values.clone()


class RowNorms(NamedTuple):
    """An upper bound of each row's norm, and which rows are equal.

    norms (N,) float32, NaN for a row that is not finite · equal (3, N) int32, None where no rows are equal: the rows
    in groups of equal ones; for each row, where in that order its group begins; and how many it has.
    """

    norms: Tensor
    equal: Tensor | None = None


def pack(rows: Tensor, row_scale: Tensor | None) -> RowNorms:
    """The norms and the equal rows of rows (N, E). It waits for the device."""
    if not has_code(rows.device):
        return RowNorms(matmul.row_norms(rows, row_scale), None)
    return RowNorms(row_norms(rows, row_scale), equal_rows(rows, row_scale))


def row_norms(rows: Tensor, row_scale: Tensor | None) -> Tensor:
    """The norms of rows (N, E). A row that is not finite is marked: raising an error would wait for the device."""
    rows = aligned(rows)
    norms = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    stream = torch.cuda.current_stream(rows.device).cuda_stream
    with torch.cuda.device(rows.device):
        code().cuda_row_norms(rows.device.index, _native_rows(rows, row_scale), norms.data_ptr(), stream)
    return norms


def equal_rows(rows: Tensor, row_scale: Tensor | None) -> Tensor | None:
    """`RowNorms.equal` of rows (N, E), with their scales (N,).

    Rows of one hash stand together, and neighbours are compared bit by bit: a collision may part equal rows, but joins
    no others. (0.0 and -0.0 are not equal here, which only costs time.)
    """
    count = rows.shape[0]
    bits = rows.contiguous().view(BITS[rows.itemsize])
    scale_bits = None if row_scale is None else row_scale.view(torch.int32)
    generator = torch.Generator("cpu").manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1] + 1,), generator=generator, device="cpu").to(rows.device)
    step = max(1, SCAN_VALUES // rows.shape[1])
    hashes = torch.cat([(part.long() * factors[:-1]).sum(1) for part in bits.split(step)])  # modulo 2^64
    if scale_bits is not None:
        hashes += scale_bits.long() * factors[-1]
    sorted_hashes, order = hashes.sort(stable=True)  # equal ones by rising row
    same = sorted_hashes[1:] == sorted_hashes[:-1]
    for places in same.nonzero()[:, 0].split(step):
        these, others = order[places], order[places + 1]
        are_equal = (bits[these] == bits[others]).all(1)
        if scale_bits is not None:
            are_equal &= scale_bits[these] == scale_bits[others]
        same[places] = are_equal
    if not same.any():
        return None
    begins = torch.cat([same.new_ones(1), ~same])
    group = begins.cumsum(0) - 1  # of each place
    first = begins.nonzero()[:, 0]
    size = torch.diff(first, append=first.new_tensor([count]))
    equal = torch.empty(3, count, dtype=torch.int32, device=rows.device)
    equal[0] = order
    equal[1, order] = first[group].int()
    equal[2, order] = size[group].int()
    return equal


def search(
    queries: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    packed: RowNorms | None,
    k: int,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best rows (N, E) of each query (Q, E) by (score falling, index rising): scores and indices, both (Q, k).

    `packed` comes from `pack`; with None the search itself finds the norms, but no equal rows. A row that is not
    finite, or that allowed (N,) bool excludes, is never returned; results are padded with score −inf and index −1. A
    query that is not finite gets scores NaN and indices −1. Databases (n, N, E) of float numbers are searched one after
    the other, for queries (n, Q, E).
    """
    if rows.dim() == 3:
        return topk_of_each(lambda some, database: search(some, database, None, None, k), queries, rows)
    queries, rows = aligned(queries.float()), aligned(rows)
    if not has_code(rows.device):
        norms = matmul.row_norms(rows, row_scale) if packed is None else packed.norms
        return matmul.search(queries, rows, row_scale, norms, k, allowed)
    if packed is None and allowed is None:
        norms = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        return _search(queries, rows, row_scale, norms, k, finds_norms=True)
    norms, equal = (row_norms(rows, row_scale), None) if packed is None else packed
    if allowed is not None:  # the first of equal rows may be excluded, so all are searched
        norms, equal = norms.masked_fill(~allowed, torch.nan), None
    if equal is None or k > FIRST_PASS_TOPK:
        return _search(queries, rows, row_scale, norms, k)
    order, begin, _ = equal
    is_first = order[begin] == torch.arange(len(order), dtype=torch.int32, device=order.device)
    scores, indices = _search(queries, rows, row_scale, norms.masked_fill(~is_first, torch.nan), k)
    step = max(1, EXPANDED_ROWS // k**2)
    for some, others in zip(scores.split(step), indices.split(step), strict=True):
        best = _with_equal_rows(some, others, equal)
        some.copy_(best.scores)
        others.copy_(best.indices)
    return scores, indices


def _with_equal_rows(scores: Tensor, indices: Tensor, equal: Tensor) -> TopK:
    """The k best rows (Q, k) where those found (Q, k) are the first ones of their groups.

    A row that is better than a first row, or equal to it and before it, is better than all of its group, so the k best
    of the first rows hold the first row of every group in the answer.
    """
    order, begin, size = equal
    k = scores.shape[1]
    row = indices.clamp(min=0)
    place = torch.arange(k, device=row.device)
    there = (place < size[row][..., None]) & (indices >= 0)[..., None]  # [Q, k, k]
    members = order[(begin[row].long()[..., None] + place).clamp(max=len(order) - 1)].long()
    candidates = TopK(scores[..., None].expand(members.shape).flatten(1), members.masked_fill(~there, -1).flatten(1))
    return merge_topk([candidates], [0], k)


def _search(
    queries: Tensor, rows: Tensor, row_scale: Tensor | None, norms: Tensor, k: int, *, finds_norms: bool = False
) -> tuple[Tensor, Tensor]:
    """`search` in aligned tensors, over the rows whose norm is a number. With `finds_norms` it writes the norms."""
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
                finds_norms and start == 0,
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
