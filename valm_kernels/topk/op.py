"""`ip_topk` as a torch operator, so that it can be compiled and exported. Arguments are checked before, in api.py;
whether the numbers are finite is checked here, where there are numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from valm_kernels.native import native
from valm_kernels.topk.checks import check_finite
from valm_kernels.topk.reference import dequantise

torch.library.define(
    "valm_kernels::ip_topk",
    "(Tensor queries, Tensor database, Tensor? row_scale, int k) -> (Tensor scores, Tensor indices)",
)


@torch.library.register_fake("valm_kernels::ip_topk")
def _fake(queries: Tensor, database: Tensor, row_scale: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


@torch.library.impl("valm_kernels::ip_topk", "CPU")
def _cpu(queries: Tensor, database: Tensor, row_scale: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    if row_scale is None:
        check_finite(database, "database")
    queries = queries.float().contiguous()
    rows = dequantise(database, row_scale).contiguous()
    scores = queries.new_empty(queries.shape[0], k)
    indices = scores.new_empty(scores.shape, dtype=torch.int64)
    native().ip_topk_cpu(
        queries.data_ptr(),
        queries.shape[0],
        rows.data_ptr(),
        *rows.shape,
        k,
        torch.get_num_threads(),
        scores.data_ptr(),
        indices.data_ptr(),
    )
    broken = ~queries.isfinite().all(1, keepdim=True)
    return scores.masked_fill_(broken, torch.nan), indices.masked_fill_(broken, -1)
