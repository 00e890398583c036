"""The public functions of exact top-K inner product search: arguments are checked here, then dispatched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from valm_kernels.topk import cpu, cuda, op, reference  # noqa: F401  (op registers the operator)
from valm_kernels.topk.checks import as_tensor, check_database, check_float, check_search

IMPLS = ("auto", "cpu", "cuda", "reference")


class TopK(NamedTuple):
    """The k best rows of each query, by (score falling, index rising).

    scores (..., k) float32 and indices (..., k) int64: torch tensors, or numpy arrays for numpy queries.
    A query with NaN or infinity has scores NaN and indices −1.
    """

    scores: Tensor | np.ndarray
    indices: Tensor | np.ndarray


def ip_topk(queries: Tensor | np.ndarray, database: Tensor | np.ndarray, k: int, *, impl: str = "auto") -> TopK:
    """The k database rows of largest inner product for each query: exact, and the same whatever computes it.

    The score is the sum of the products in float64 in one fixed order, rounded to float32
    (`valm_kernels.topk.reference.exact_scores`). For repeated searches a `FlatIPIndex` is faster: this function
    prepares the database in every call.

    Args:
        queries: (..., E) float32, float16 or bfloat16; any number of them, none too.
        database: (N, E), same dtypes, same device; E from 8 to 2048. Its numbers must be finite: a CPU search
            refuses a row that is not, a CUDA search never returns one.
        k: 1 to 128, at most N.
        impl: "auto" (by device), "cpu", "cuda" or "reference" (plain PyTorch, any device).

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape, device, k or impl, or a row that is not finite; the message says which.
        ImportError: the native code that `impl` needs is not built.
    """
    rows = as_tensor(database, "database")
    check_database(rows)
    check_float(rows, "database")
    flat = as_tensor(queries, "queries")
    check_search(flat, *rows.shape, rows.device, k)
    return like_queries(queries, *search(flat, rows, None, k, impl=impl))


def search(
    queries: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    k: int,
    first_pass: cpu.FirstPass | cuda.FirstPass | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dispatch of checked arguments: scores and indices (..., k) of queries (..., E)."""
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}, expected one of {', '.join(IMPLS)}")
    if impl in ("cpu", "cuda") and rows.device.type != impl:
        raise ValueError(f"impl={impl!r} needs tensors on {impl}, but the database is on {rows.device}")
    flat = queries.reshape(-1, queries.shape[-1])  # [Q, E]
    if impl == "reference":
        scores, indices = reference.ip_topk(flat, rows, row_scale, k)
    elif first_pass is None:
        scores, indices = torch.ops.valm_kernels.ip_topk(flat, rows, row_scale, k)
    elif isinstance(first_pass, cuda.FirstPass):
        scores, indices = torch.ops.valm_kernels.normed_ip_topk(flat, rows, row_scale, *first_pass, k)
    else:
        scores, indices = torch.ops.valm_kernels.packed_ip_topk(flat, rows, row_scale, *first_pass, k)
    shape = (*queries.shape[:-1], k)
    return scores.reshape(shape), indices.reshape(shape)


def like_queries(queries: Tensor | np.ndarray, scores: Tensor, indices: Tensor) -> TopK:
    """The answer in the queries' own kind."""
    if isinstance(queries, np.ndarray):
        return TopK(scores.numpy(), indices.numpy())
    return TopK(scores, indices)


def merge_topk(results: Sequence[TopK], offsets: Sequence[int], k: int) -> TopK:
    """Joins the answers of the shards of one database into the answer of the whole.

    Args:
        results: one `TopK` per shard, for the same queries; a shard with fewer than k rows has fewer columns.
            An index of −1 is no row.
        offsets: the number of each shard's first row in the whole database.
        k: how many to keep, at most the columns given. Where fewer of them are rows, index −1 and score −inf
            fill up.

    Raises:
        ValueError: no results, their shapes disagree, a wrong k, or not one offset for each.
    """
    if not results or len(results) != len(offsets):
        raise ValueError(f"merge_topk got {len(results)} results and {len(offsets)} offsets, expected one for each")
    if not 1 <= k <= sum(result.scores.shape[-1] for result in results):
        raise ValueError(f"k is {k}, expected 1 to the {sum(r.scores.shape[-1] for r in results)} columns given")
    leading = {tuple(result.scores.shape[:-1]) for result in results}
    if len(leading) != 1:
        raise ValueError(f"results are of different queries: leading shapes {sorted(leading)}")
    scores = [as_tensor(result.scores, "results") for result in results]
    indices = [as_tensor(result.indices, "results") for result in results]
    all_scores = torch.cat(scores, -1)
    all_indices = torch.cat(
        [torch.where(part < 0, -1, part + offset) for part, offset in zip(indices, offsets, strict=True)], -1
    )
    broken = all_scores.isnan().any(-1, keepdim=True)
    all_scores = all_scores.masked_fill(all_indices < 0, -torch.inf)
    # two stable sorts: by index rising (none last), then by score falling
    rank = torch.where(all_indices < 0, torch.iinfo(torch.int64).max, all_indices)
    by_index = rank.sort(dim=-1, stable=True).indices
    by_score = all_scores.gather(-1, by_index).sort(dim=-1, descending=True, stable=True).indices
    order = by_index.gather(-1, by_score[..., :k])
    scores_k = all_scores.gather(-1, order).masked_fill(broken, torch.nan)
    indices_k = all_indices.gather(-1, order).masked_fill(broken, -1)
    return like_queries(results[0].scores, scores_k, indices_k)
