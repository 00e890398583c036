"""The search as a torch operator, so that it can be compiled and exported.

api.py and index.py check arguments first; the code that reads the numbers checks that they are finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from . import cpu, cuda, streaming

NAME = add_op_namespace_prefix("ip_topk")
# `allowed` (N,) bool flags the rows that may be returned. Streamed rows are on the CPU. The last tensors are the fields
# of cpu.PackedRows, then of cuda.RowNorms. Without them and `allowed` there may be several databases (n, N, E), with
# queries (n, Q, E).
torch.library.define(
    NAME,
    "(Tensor queries, Tensor rows, Tensor? row_scale, int k, Tensor? allowed=None, bool streamed=False, "
    "Tensor? codes=None, Tensor? stats=None, Tensor? frame=None, Tensor? first_rows=None, Tensor? next_duplicate=None, "
    "Tensor? norms=None) -> (Tensor scores, Tensor indices)",
)
NO_PACKED_ROWS = (None,) * len(cpu.PackedRows._fields)


def tensors_of(prepared: cpu.PackedRows | cuda.RowNorms | None) -> tuple[Tensor | None, ...]:
    """The last arguments of the operator, from a prepared copy of the rows."""
    return (*NO_PACKED_ROWS, *prepared) if isinstance(prepared, cuda.RowNorms) else prepared or ()


@torch.library.register_fake(NAME)
def _ip_topk_fake(
    queries: Tensor, rows: Tensor, row_scale: Tensor | None, k: int, *others: object
) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:-1], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


@torch.library.impl(NAME, "CPU")
def _ip_topk_cpu(
    queries: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    k: int,
    allowed: Tensor | None = None,
    streamed: bool = False,
    *packed: Tensor,
) -> tuple[Tensor, Tensor]:
    if streamed:
        return streaming.search(queries, rows, row_scale, k, allowed)
    packed_rows = cpu.PackedRows(*packed) if packed else None
    return cpu.search(queries, rows.contiguous(), row_scale, packed_rows, k, allowed)


@torch.library.impl(NAME, "CUDA")
def _ip_topk_cuda(
    queries: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    k: int,
    allowed: Tensor | None = None,
    streamed: bool = False,
    *tensors: Tensor,
) -> tuple[Tensor, Tensor]:
    if streamed:
        return streaming.search(queries, rows, row_scale, k, allowed)
    norms = cuda.RowNorms(*tensors[len(NO_PACKED_ROWS) :]) if tensors else None
    return cuda.search(queries, rows, row_scale, norms, k, allowed)
