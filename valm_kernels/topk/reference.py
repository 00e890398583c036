"""Executable specification of exact top-K inner product search, in plain PyTorch.

csrc/topk/exact.hpp computes the same in C++; the two agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_finite
from .result import topk_of_each

EXACT_LANES = 32
# Float64 partial sums per chunk, at most (64 MiB).
PARTIAL_SUMS_PER_CHUNK = 1 << 23


def exact_scores(queries: Tensor, rows: Tensor) -> Tensor:
    """Scores (Q, N) float32 of queries (Q, E) and rows (N, E), both float32.

    A score is the sum of the products in float64, in one fixed order: `EXACT_LANES` interleaved partial sums, joined
    pairwise (l with l + 16, then l + 8, ...). It is rounded once to float32, and −0 becomes +0.
    """
    return _sums_of_products(queries[:, None], rows[None])


def pair_scores(
    queries: Tensor, rows: Tensor, query_ids: Tensor, row_ids: Tensor, row_scale: Tensor | None = None
) -> Tensor:
    """Scores (n,) float32 of pairs of queries (Q, E) and rows (N, E), named by ids (n,); int8 rows need row_scale."""
    chunk = max(1, PARTIAL_SUMS_PER_CHUNK // rows.shape[1])
    scores = []
    for some, others in zip(query_ids.split(chunk), row_ids.split(chunk), strict=True):
        values = dequantise(rows[others], None if row_scale is None else row_scale[others])
        scores.append(_sums_of_products(queries[some].float(), values))
    return torch.cat(scores)


def _sums_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Sums over the last dimension; the others are broadcast."""
    padding = (0, -a.shape[-1] % EXACT_LANES)
    a, b = (torch.nn.functional.pad(factor.double(), padding) for factor in (a, b))  # [..., S·32]
    lanes = sum(x * y for x, y in zip(a.split(EXACT_LANES, -1), b.split(EXACT_LANES, -1), strict=True))  # [..., 32]
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, dim=-1)
        lanes = low + high
    return lanes[..., 0].float() + 0.0


def dequantise(rows: Tensor, row_scale: Tensor | None) -> Tensor:
    """Stored rows (N, E) as the float32 values that are searched: int8 rows are multiplied by their scale (N,)."""
    rows = rows.float()
    return rows if row_scale is None else rows * row_scale[:, None]


def ip_topk(
    queries: Tensor, database: Tensor, row_scale: Tensor | None, k: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best rows of each query by (score falling, index rising): scores and indices, both (Q, k).

    queries (Q, E) and database (N, E) have any float dtype, or the database is int8 with row_scale (N,). Only rows in
    allowed (N,) bool are returned, padded with score −inf and index −1. A query that is not finite gets scores NaN and
    indices −1. A row that is not finite raises a ValueError on the CPU, and is not returned elsewhere.
    Float databases (n, N, E) take queries (n, Q, E) and return (n, Q, k).
    """
    if database.dim() == 3:
        return topk_of_each(lambda some, rows: ip_topk(some, rows, None, k), queries, database)
    if database.device.type == "cpu" and database.is_floating_point():
        check_finite(database, "database")
    elif not (finite := database.isfinite().all(1)).all():
        allowed = finite if allowed is None else finite & allowed
    if allowed is not None:
        ids = allowed.nonzero()[:, 0]
        found = min(k, len(ids))
        scale = None if row_scale is None else row_scale[ids]
        scores, indices = ip_topk(queries, database[ids], scale, found)
        indices = torch.where(indices < 0, -1, ids[indices]) if found else indices
        missing, broken = (0, k - found), ~queries.isfinite().all(1, keepdim=True)
        scores = torch.nn.functional.pad(scores, missing, value=-torch.inf).masked_fill(broken, torch.nan)
        return scores, torch.nn.functional.pad(indices, missing, value=-1)
    queries = queries.float()
    chunk = max(1, PARTIAL_SUMS_PER_CHUNK // EXACT_LANES // max(1, queries.shape[0]))
    best_scores = queries.new_empty(queries.shape[0], 0)
    best_indices = best_scores.long()
    for start in range(0, database.shape[0], chunk):
        scale = None if row_scale is None else row_scale[start : start + chunk]
        scores = exact_scores(queries, dequantise(database[start : start + chunk], scale))
        indices = torch.arange(start, start + scores.shape[1], device=queries.device).expand_as(scores)
        # earlier rows stand first and the sort is stable, so equal scores stay in order of their index
        scores, order = torch.cat([best_scores, scores], 1).sort(dim=1, descending=True, stable=True)
        best_scores = scores[:, :k]
        best_indices = torch.cat([best_indices, indices], 1).gather(1, order[:, :k])
    broken = ~queries.isfinite().all(1, keepdim=True)
    return best_scores.masked_fill(broken, torch.nan), best_indices.masked_fill(broken, -1)
