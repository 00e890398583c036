"""The searches as torch operators, so that they can be compiled and exported.

api.py and index.py check arguments first; the code that reads the numbers checks that they are finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from . import cpu, cuda, streaming

# `allowed` (N,) bool names the rows that may be returned. ip_topk also takes databases (n, N, E) and queries (n, Q, E).
torch.library.define(
    add_op_namespace_prefix("ip_topk"),
    "(Tensor queries, Tensor database, Tensor? row_scale, int k, Tensor? allowed=None) "
    "-> (Tensor scores, Tensor indices)",
)
torch.library.define(
    add_op_namespace_prefix("packed_ip_topk"),
    "(Tensor queries, Tensor database, Tensor? row_scale, Tensor codes, Tensor stats, Tensor frame, "
    "Tensor? first_rows, Tensor? next_duplicate, int k, Tensor? allowed=None) -> (Tensor scores, Tensor indices)",
)
torch.library.define(
    add_op_namespace_prefix("normed_ip_topk"),
    "(Tensor queries, Tensor database, Tensor? row_scale, Tensor norms, Tensor? equal, int k, Tensor? allowed=None) "
    "-> (Tensor scores, Tensor indices)",
)
torch.library.define(
    add_op_namespace_prefix("streamed_ip_topk"),
    "(Tensor queries, Tensor rows, Tensor? row_scale, int k, Tensor? allowed=None) -> (Tensor scores, Tensor indices)",
)


@torch.library.register_fake(add_op_namespace_prefix("streamed_ip_topk"))
@torch.library.register_fake(add_op_namespace_prefix("ip_topk"))
def _ip_topk_fake(
    queries: Tensor, database: Tensor, row_scale: Tensor | None, k: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:-1], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


@torch.library.impl(add_op_namespace_prefix("ip_topk"), "CPU")
def _ip_topk_cpu(
    queries: Tensor, database: Tensor, row_scale: Tensor | None, k: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return cpu.search(queries, database.contiguous(), row_scale, None, k, allowed)


@torch.library.impl(add_op_namespace_prefix("ip_topk"), "CUDA")
def _ip_topk_cuda(
    queries: Tensor, database: Tensor, row_scale: Tensor | None, k: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return cuda.search(queries, database, row_scale, None, k, allowed)


@torch.library.register_fake(add_op_namespace_prefix("packed_ip_topk"))
def _packed_ip_topk_fake(
    queries: Tensor,
    database: Tensor,
    row_scale: Tensor | None,
    codes: Tensor,
    stats: Tensor,
    frame: Tensor,
    first_rows: Tensor | None,
    next_duplicate: Tensor | None,
    k: int,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _ip_topk_fake(queries, database, row_scale, k)


@torch.library.impl(add_op_namespace_prefix("packed_ip_topk"), "CPU")
def _packed_ip_topk_cpu(
    queries: Tensor,
    database: Tensor,
    row_scale: Tensor | None,
    codes: Tensor,
    stats: Tensor,
    frame: Tensor,
    first_rows: Tensor | None,
    next_duplicate: Tensor | None,
    k: int,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    packed = cpu.PackedRows(codes, stats, frame, first_rows, next_duplicate)
    return cpu.search(queries, database, row_scale, packed, k, allowed)


@torch.library.register_fake(add_op_namespace_prefix("normed_ip_topk"))
def _normed_ip_topk_fake(
    queries: Tensor,
    database: Tensor,
    row_scale: Tensor | None,
    norms: Tensor,
    equal: Tensor | None,
    k: int,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _ip_topk_fake(queries, database, row_scale, k)


@torch.library.impl(add_op_namespace_prefix("normed_ip_topk"), "CUDA")
def _normed_ip_topk_cuda(
    queries: Tensor,
    database: Tensor,
    row_scale: Tensor | None,
    norms: Tensor,
    equal: Tensor | None,
    k: int,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return cuda.search(queries, database, row_scale, cuda.RowNorms(norms, equal), k, allowed)


# the rows are on the CPU, the queries on any device
@torch.library.impl(add_op_namespace_prefix("streamed_ip_topk"), "CompositeExplicitAutograd")
def _streamed_ip_topk(
    queries: Tensor, rows: Tensor, row_scale: Tensor | None, k: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return streaming.search(queries, rows, row_scale, k, allowed)
