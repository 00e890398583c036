"""Exact top-K inner product search by PyTorch's matrix products: impl="matmul", and the search on GPUs without native
CUDA code (no nvcc, a CPU wheel, ROCm).

A matrix product gives every score up to a proven error; pairs that may be among the k best are then scored exactly.
For 16-bit rows the queries q are rounded to 16 bits, q'; otherwise q' is q::

    |product - score| <= (|q - q'| + r |q'|) |row| + E 2^-125

The last term covers subnormal products. With torch.set_flush_denormal, subnormal queries and rows are searched as
zeros. On tensor cores r is 2^-18 for each 16 of the E elements (csrc/topk/cuda/kernel.cuh). For E float32 products
summed in any order, with operands rounded to a relative error e (TF32)::

    r = E u / (1 - E u) (1 + e)^2 + 2 e + e^2      u = 2^-24

(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..native import survives_fork
from .checks import check_finite
from .reference import dequantise, pair_scores
from .result import TopK, merge_topk, topk_of_each

# The most scores of one matrix product (32 MiB, which fits an H100's second-level cache of 50 MB), and its queries.
SCORES_PER_CHUNK = 1 << 23
QUERIES_PER_CHUNK = 1 << 12
# Values of rows that are copied to float32 at a time. Rows that tensor cores multiply are not copied.
VALUES_PER_CHUNK = 1 << 24
# The relative error to which PyTorch may round the operands of a float32 product.
OPERAND_ERRORS = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}
# Queries are scaled until their largest element has this exponent; for float16 it loses least to subnormal numbers.
LARGEST = {torch.float16: 15, torch.bfloat16: 0}


@survives_fork
def ip_topk(queries: Tensor, rows: Tensor, k: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Equals `valm_kernels.topk.reference.ip_topk` for float rows."""
    if rows.dim() == 3:
        return topk_of_each(lambda some, database: ip_topk(some, database, k), queries, rows)
    if rows.device.type == "cpu":
        check_finite(rows, "database")
    return search(queries, rows, None, row_norms(rows, None), k, allowed)


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
    """As `valm_kernels.topk.cuda.search`, with the `row_norms` of the rows. It waits for the device."""
    queries = queries.float()
    broken = ~queries.isfinite().all(1, keepdim=True)
    if allowed is not None:
        norms = norms.masked_fill(~allowed, torch.nan)
    parts = queries.masked_fill(broken, 0).split(QUERIES_PER_CHUNK)
    found = [_search(part, rows, row_scale, norms, k) for part in parts]
    scores, indices = (torch.cat(results) for results in zip(*found, strict=True))
    return scores.masked_fill(broken, torch.nan), indices.masked_fill(broken, -1)


class _Factor(NamedTuple):
    """Queries as the left factor of products: values (Q, E), about scale (Q, 1) times the queries, and norm (Q, 1).
    A product divided by scale differs from its score by at most error (Q, 1) times the row's norm, plus tiny (Q, 1).
    """

    values: Tensor
    norm: Tensor
    scale: Tensor
    error: Tensor
    tiny: Tensor

    def errors(self, norms: Tensor, queries: Tensor | slice = slice(None)) -> Tensor:
        """The errors of products with rows of these norms; 0 for a query of zeros (0 times infinity would be NaN)."""
        error = self.error[queries]
        return torch.where(error > 0, error * norms + self.tiny[queries], 0)


def _factor(queries: Tensor, dtype: torch.dtype) -> _Factor:
    """Finite queries (Q, E) for rows of this dtype."""
    dim = queries.shape[1]
    values, exact = queries, queries.double()
    scale = torch.ones_like(exact[:, :1])
    if dtype in LARGEST:
        scale = torch.exp2(LARGEST[dtype] - queries.abs().amax(1, keepdim=True).frexp().exponent.double())
        values = (exact * scale).to(dtype)
    relative = -(-dim // 16) * 2.0**-18 if _on_tensor_cores(values) else _relative_error(dim)
    rounded = values.double() / scale
    norm, lost = (x.square().sum(1, keepdim=True).sqrt() for x in (rounded, exact - rounded))
    return _Factor(values, norm * scale, scale, (lost + relative * norm) * (1 + 2**-20), dim * 2.0**-125 / scale)


def _on_tensor_cores(factor: Tensor) -> bool:
    """Whether PyTorch multiplies these 16-bit numbers without conversion, with sums in float32."""
    if factor.dtype not in LARGEST or not factor.is_cuda or torch.version.hip is not None:
        return False
    if factor.dtype == torch.float16 and getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False):
        return False
    return torch.cuda.get_device_capability(factor.device) >= (8, 0)


def _product(queries: Tensor, rows: Tensor) -> Tensor:
    """The products (Q, N) float32 of (Q, E) and (N, E) of one dtype."""
    with torch.autocast(queries.device.type, enabled=False):
        if _on_tensor_cores(queries):
            return torch.mm(queries, rows.T, out_dtype=torch.float32)
        return queries.float() @ rows.float().T


def _search(queries: Tensor, rows: Tensor, row_scale: Tensor | None, norms: Tensor, k: int) -> TopK:
    """The k best rows of each finite query (Q, E), among those whose norm is a number."""
    factor = _factor(queries, rows.dtype)
    best = TopK(queries.new_full((len(queries), k), -torch.inf), queries.new_full((len(queries), k), -1).long())
    found: list[Tensor] = []  # (2, n): queries, and rows that may be among their best
    many = len(queries) * k
    step = SCORES_PER_CHUNK // max(1, len(queries))
    if not _on_tensor_cores(factor.values):
        step = min(step, VALUES_PER_CHUNK // rows.shape[1])
    step = max(k, step)
    for start in range(0, rows.shape[0], step):
        chunk = slice(start, start + step)
        values = rows[chunk] if rows.dtype in LARGEST else _values(rows, row_scale, chunk)
        product = _product(factor.values, values)  # [Q, n]
        query, row = _candidates(factor, product, norms[chunk], best, many)
        found.append(torch.stack([query, row + start]))
        if sum(pairs.shape[1] for pairs in found) >= many or chunk.stop >= rows.shape[0]:
            query, row = torch.cat(found, 1)
            scores = pair_scores(queries, rows, query, row, row_scale)
            best = merge_topk([best, _best(query, row, scores, len(queries), k)], [0, 0], k)
            found = []
    return best


def _candidates(factor: _Factor, product: Tensor, norm: Tensor, best: TopK, many: int) -> tuple[Tensor, Tensor]:
    """Queries and rows of the products (Q, n) that may be among the best; `best` is the result of earlier rows.

    Bounds are rounded like scores, which preserves their order. Of equal scores the lower row wins.
    """
    norm = norm.double()
    searched = ~norm.isnan()
    largest, down = norm.nan_to_num(0, torch.inf).amax(), best.scores.new_full((), -torch.inf)

    def near(least: Tensor) -> Tensor:
        """Compares all products with one bound, by their largest error; if a sum could overflow, all are near."""
        bar = (torch.nextafter(least, down).double() - factor.errors(largest)) * factor.scale
        overflows = factor.norm * largest > 2.0**126
        return ~(product < torch.nextafter(bar.float(), down).masked_fill(overflows, -torch.inf))

    least = best.scores[:, -1:]
    mask = near(least)
    if mask.sum() > many:  # the k-th best lower bound of these rows leaves fewer
        unknown = ~(product.isfinite() & searched)
        lower = (product.double() / factor.scale - factor.errors(norm)).masked_fill(unknown, -torch.inf).float()
        least = torch.maximum(least, lower.topk(min(best.scores.shape[1], lower.shape[1]), dim=1).values[:, -1:])
        mask = near(least)
    query, row = mask.nonzero(as_tuple=True)
    products = product[query, row].double()
    upper = products / factor.scale[query, 0] + factor.errors(norm[row, None], query)[:, 0]
    upper = upper.masked_fill(~products.isfinite(), torch.inf).float()
    # rows found before come before these, so among equal scores they win
    better = (best.indices[query, -1] < 0) | (upper > best.scores[query, -1])
    kept = searched[row] & (upper >= least[query, 0]) & better
    return query[kept], row[kept]


def _best(query: Tensor, row: Tensor, scores: Tensor, count: int, k: int) -> TopK:
    """The k best pairs for each of `count` queries; pairs (n,) are sorted by query, then by row."""
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
    """Bound of the error of a product of E = dim terms, relative to the norms of its operands."""
    try:
        operand = OPERAND_ERRORS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # it was set in a way that PyTorch cannot report here
        operand = OPERAND_ERRORS["medium"]
    unit = dim * 2.0**-24
    return (unit / (1 - unit) * (1 + operand) ** 2 + 2 * operand + operand**2) * (1 + 2**-20)
