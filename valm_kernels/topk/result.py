"""The result of a search, and the merge of results from a database's shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor

from ..native import survives_fork
from .checks import as_tensor, is_array

if TYPE_CHECKING:
    import numpy as np


class TopK(NamedTuple):
    """The k best rows of each query, as torch tensors: higher scores first, of equal scores the lower index.

    scores (..., k) is float32, indices (..., k) is int64. Padding has index −1 and score −inf. A query with NaN or
    infinity gets scores NaN and indices −1.

    Example:
        >>> scores, indices = valm_kernels.ip_topk(torch.eye(8)[:1], torch.eye(8), k=2)
        >>> scores
        tensor([[1., 0.]])
    """

    scores: Tensor
    indices: Tensor


class NumpyTopK(NamedTuple):
    """A `TopK` of numpy arrays, the result for numpy queries.

    Example:
        >>> vectors = np.eye(8, dtype=np.float32)
        >>> valm_kernels.ip_topk(vectors[:1], vectors, k=2)
        NumpyTopK(scores=array([[1., 0.]], dtype=float32), indices=array([[0, 1]]))
    """

    scores: np.ndarray
    indices: np.ndarray


@overload
def like_queries(queries: Tensor, scores: Tensor, indices: Tensor) -> TopK: ...
@overload
def like_queries(queries: np.ndarray, scores: Tensor, indices: Tensor) -> NumpyTopK: ...
def like_queries(queries: Tensor | np.ndarray, scores: Tensor, indices: Tensor) -> TopK | NumpyTopK:
    """The result in tensors or numpy arrays, like the queries."""
    if is_array(queries):
        return NumpyTopK(scores.numpy(), indices.numpy())
    return TopK(scores, indices)


def topk_of_each(search: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], queries: Tensor, rows: Tensor) -> TopK:
    """Searches databases (n, N, E) one after the other, each for its queries (n, Q, E): results (n, Q, k)."""
    found = [search(some, database) for some, database in zip(queries, rows, strict=True)]
    return TopK(*(torch.stack(results) for results in zip(*found, strict=True)))


@overload
def merge_topk(results: Sequence[TopK], offsets: Sequence[int], k: int) -> TopK: ...
@overload
def merge_topk(results: Sequence[NumpyTopK], offsets: Sequence[int], k: int) -> NumpyTopK: ...
@survives_fork
def merge_topk(results: Sequence[TopK] | Sequence[NumpyTopK], offsets: Sequence[int], k: int) -> TopK | NumpyTopK:
    """Merges the results of the shards of one database into the result of the whole.

    Args:
        results: one `TopK` or `NumpyTopK` (..., k_i) per shard, for the same queries. A shard with fewer than k rows
            returns fewer columns. An index of −1 is padding.
        offsets: the number of each shard's first row in the whole database.
        k: results per query, at most the columns of all shards together.

    Returns:
        A `TopK`, or a `NumpyTopK` if the queries were numpy arrays, with k columns, padded with index −1 and score
        −inf.

    Raises:
        TypeError: a result is not a `TopK` or has a wrong dtype, or an offset or k is not an int.
        ValueError: no results, shapes that disagree, a wrong k or offset, or not one offset per result.

    Example:
        >>> query, database = torch.eye(8)[5:6], torch.eye(8)
        >>> shards = [valm_kernels.ip_topk(query, rows, k=2) for rows in database.split(4)]
        >>> valm_kernels.merge_topk(shards, offsets=[0, 4], k=1).indices
        tensor([[5]])
    """
    if not results or len(results) != len(offsets):
        raise ValueError(f"merge_topk got {len(results)} results and {len(offsets)} offsets, expected one for each")
    for number in (*offsets, k):
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise TypeError(f"offsets and k of merge_topk must be ints, got {number!r}")
    for number in offsets:
        if not 0 <= number <= 2**62:  # a sum with an index below 0 would be padding
            raise ValueError(f"an offset is {number}, expected 0 to 2**62")
    for number, result in enumerate(results):
        if not isinstance(result, TopK | NumpyTopK):
            raise TypeError(f"results[{number}] must be a TopK or NumpyTopK, but is a {type(result).__name__}")
        parts = [as_tensor(part, f"results[{number}].{name}") for name, part in result._asdict().items()]
        dtypes = [part.dtype for part in parts]
        if dtypes != [torch.float32, torch.int64]:
            raise TypeError(f"results[{number}] has scores and indices in {dtypes}, expected float32 and int64")
        if parts[0].shape != parts[1].shape:
            raise ValueError(
                f"results[{number}] has scores of shape {tuple(parts[0].shape)} and indices of {tuple(parts[1].shape)}"
            )
    if not 1 <= k <= sum(result.scores.shape[-1] for result in results):
        raise ValueError(f"k is {k}, expected 1 to the {sum(r.scores.shape[-1] for r in results)} columns given")
    leading = {tuple(result.scores.shape[:-1]) for result in results}
    if len(leading) != 1:
        raise ValueError(f"results must be for the same queries, got leading shapes {sorted(leading)}")
    scores = [as_tensor(result.scores, "results") for result in results]
    indices = [as_tensor(result.indices, "results") for result in results]
    all_scores = torch.cat(scores, -1)
    all_indices = torch.cat(
        [torch.where(part < 0, -1, part + offset) for part, offset in zip(indices, offsets, strict=True)], -1
    )
    broken = all_scores.isnan().any(-1, keepdim=True)
    all_scores = all_scores.masked_fill(all_indices < 0, -torch.inf)
    # two stable sorts: by index rising (−1 last), then by score falling
    rank = torch.where(all_indices < 0, torch.iinfo(torch.int64).max, all_indices)
    by_index = rank.sort(dim=-1, stable=True).indices
    by_score = all_scores.gather(-1, by_index).sort(dim=-1, descending=True, stable=True).indices
    order = by_index.gather(-1, by_score[..., :k])
    scores_k = all_scores.gather(-1, order).masked_fill(broken, torch.nan)
    indices_k = all_indices.gather(-1, order).masked_fill(broken, -1)
    return like_queries(results[0].scores, scores_k, indices_k)
