"""The searches as torch operators, so that they can be compiled and exported.

api.py and index.py check arguments first; the code that reads the numbers checks that they are finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from valm_kernels.topk import cpu, cuda, streaming

torch.library.define(
    "valm_kernels::ip_topk",
    "(Tensor queries, Tensor database, Tensor? row_scale, int k) -> (Tensor scores, Tensor indices)",
)
torch.library.define(
    "valm_kernels::packed_ip_topk",
    "(Tensor queries, Tensor database, Tensor? row_scale, Tensor codes, Tensor stats, Tensor frame, "
    "Tensor? first_rows, Tensor? next_duplicate, int k) -> (Tensor scores, Tensor indices)",
)
torch.library.define(
    "valm_kernels::normed_ip_topk",
    "(Tensor queries, Tensor database, Tensor? row_scale, Tensor norms, int k) -> (Tensor scores, Tensor indices)",
)
torch.library.define(
    "valm_kernels::streamed_ip_topk",
    "(Tensor queries, Tensor rows, Tensor? row_scale, int k) -> (Tensor scores, Tensor indices)",
)


@torch.library.register_fake("valm_kernels::streamed_ip_topk")
@torch.library.register_fake("valm_kernels::ip_topk")
def _ip_topk_fake(queries: Tensor, database: Tensor, row_scale: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


@torch.library.impl("valm_kernels::ip_topk", "CPU")
def _ip_topk_cpu(queries: Tensor, database: Tensor, row_scale: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return cpu.search(queries, database.contiguous(), row_scale, None, k)


@torch.library.impl("valm_kernels::ip_topk", "CUDA")
def _ip_topk_cuda(queries: Tensor, database: Tensor, row_scale: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return cuda.search(queries, database, row_scale, None, k)


@torch.library.register_fake("valm_kernels::packed_ip_topk")
def _packed_ip_topk_fake(
    queries: Tensor, database: Tensor, row_scale: Tensor | None, *packed_and_k: Any
) -> tuple[Tensor, Tensor]:
    return _ip_topk_fake(queries, database, row_scale, packed_and_k[-1])


@torch.library.impl("valm_kernels::packed_ip_topk", "CPU")
def _packed_ip_topk_cpu(
    queries: Tensor, database: Tensor, row_scale: Tensor | None, *packed_and_k: Any
) -> tuple[Tensor, Tensor]:
    *packed, k = packed_and_k
    return cpu.search(queries, database, row_scale, cpu.PackedRows(*packed), k)


@torch.library.register_fake("valm_kernels::normed_ip_topk")
def _normed_ip_topk_fake(
    queries: Tensor, database: Tensor, row_scale: Tensor | None, norms: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    return _ip_topk_fake(queries, database, row_scale, k)


@torch.library.impl("valm_kernels::normed_ip_topk", "CUDA")
def _normed_ip_topk_cuda(
    queries: Tensor, database: Tensor, row_scale: Tensor | None, norms: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    return cuda.search(queries, database, row_scale, cuda.RowNorms(norms), k)


# the rows are on the CPU, the queries on any device
@torch.library.impl("valm_kernels::streamed_ip_topk", "CompositeExplicitAutograd")
def _streamed_ip_topk(queries: Tensor, rows: Tensor, row_scale: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return streaming.search(queries, rows, row_scale, k)
