"""Exact top-K inner product search in PyTorch: for a GPU without the native CUDA code (no nvcc, a CPU wheel, ROCm).

A matrix product in float32 gives every score up to a proven error, and the pairs that may be among the k best are then
scored exactly. For E products summed in any order, of operands that were rounded to a relative error r (TF32)::

    |product - score| <= (E u / (1 - E u) (1 + r)^2 + 2 r + r^2) |query| |row| + E 2^-125      u = 2^-24

(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); the last term is for numbers below the normal
ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import dequantise, pair_scores
from .result import TopK, merge_topk

# Scores of one matrix product, at most (64 MiB, of which several copies in float64 exist at a time), and its queries.
SCORES_PER_CHUNK = 1 << 24
QUERIES_PER_CHUNK = 1 << 10
# Numbers of rows that are float32 at a time.
VALUES_PER_CHUNK = 1 << 24
# How much PyTorch may round the operands of a product in float32.
OPERAND_ERRORS = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}


def row_norms(rows: Tensor, row_scale: Tensor | None) -> Tensor:
    """An upper bound of the norm of each row (N, E): (N,) float32, NaN for a row that is not finite."""
    norms = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    step = max(1, VALUES_PER_CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        values = _values(rows, row_scale, slice(start, start + step))
        bound = (values.double().square().sum(1).sqrt() * (1 + 2**-20)).float()
        norms[start : start + step] = bound.masked_fill(~values.isfinite().all(1), torch.nan)
    return norms


def search(
    queries: Tensor, rows: Tensor, row_scale: Tensor | None, norms: Tensor, k: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`valm_kernels.topk.cuda.search` with the `row_norms` of the rows. It waits for the device."""
    queries = queries.float()
    broken = ~queries.isfinite().all(1, keepdim=True)
    if allowed is not None:
        norms = norms.masked_fill(~allowed, torch.nan)
    parts = queries.masked_fill(broken, 0).split(QUERIES_PER_CHUNK)
    found = [_search(part, rows, row_scale, norms, k) for part in parts]
    scores, indices = (torch.cat(results) for results in zip(*found, strict=True))
    return scores.masked_fill(broken, torch.nan), indices.masked_fill(broken, -1)


def _search(queries: Tensor, rows: Tensor, row_scale: Tensor | None, norms: Tensor, k: int) -> TopK:
    """The k best rows of each finite query (Q, E), among those whose norm is a number."""
    relative = _relative_error(rows.shape[1])
    tiny = rows.shape[1] * 2.0**-125
    query_norm = queries.double().square().sum(1, keepdim=True).sqrt() * (1 + 2**-20)  # [Q, 1]
    best = TopK(queries.new_full((len(queries), k), -torch.inf), queries.new_full((len(queries), k), -1).long())
    step = max(k, min(SCORES_PER_CHUNK // max(1, len(queries)), VALUES_PER_CHUNK // rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        chunk = slice(start, start + step)
        values = _values(rows, row_scale, chunk)
        norm = norms[chunk].double()
        with torch.autocast(queries.device.type, enabled=False):
            product = (queries @ values.T).double()  # [Q, n]
        # a query of zeros has no error, and times a norm that overflowed it would be NaN
        error = torch.where(query_norm > 0, relative * query_norm * norm + tiny, 0)
        unknown = ~product.isfinite()  # it overflowed
        # rounded as scores are, which preserves their order: equal scores are told apart by their rows
        lower = (product - error).masked_fill(unknown, -torch.inf).float()
        upper = (product + error).masked_fill(unknown, torch.inf).float()
        searched = ~norm.isnan()
        lower = lower.masked_fill(~searched, -torch.inf)
        least = lower.topk(min(k, lower.shape[1]), dim=1).values[:, -1:]
        # rows found before come before these, so among equal scores they win
        better = (best.indices[:, -1:] < 0) | (upper > best.scores[:, -1:])
        query, row = (searched & (upper >= least) & better).nonzero(as_tuple=True)
        scores = pair_scores(queries, values, query, row)
        best = merge_topk([best, _best(query, row, scores, len(queries), k)], [0, start], k)
    return best


def _best(query: Tensor, row: Tensor, scores: Tensor, count: int, k: int) -> TopK:
    """The k best of pairs (n,) that stand in order of query and row, for each of `count` queries."""
    order = scores.argsort(descending=True, stable=True)
    order = order[query[order].argsort(stable=True)]
    query, row, scores = query[order], row[order], scores[order]
    pairs = query.bincount(minlength=count)
    rank = torch.arange(len(query), device=query.device) - (pairs.cumsum(0) - pairs)[query]
    first = rank < k
    best = TopK(scores.new_full((count, k), -torch.inf), row.new_full((count, k), -1))
    best.scores[query[first], rank[first]] = scores[first]
    best.indices[query[first], rank[first]] = row[first]
    return best


def _values(rows: Tensor, row_scale: Tensor | None, part: slice) -> Tensor:
    return dequantise(rows[part], None if row_scale is None else row_scale[part])


def _relative_error(dim: int) -> float:
    """Bound of the error of a product of E = dim terms, over the norms of its operands."""
    try:
        operand = OPERAND_ERRORS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # it was set in another way than PyTorch can tell here
        operand = OPERAND_ERRORS["medium"]
    unit = dim * 2.0**-24
    return (unit / (1 - unit) * (1 + operand) ** 2 + 2 * operand + operand**2) * (1 + 2**-20)
