"""The public functions of exact top-K inner product search: they check arguments and dispatch."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from torch import Tensor

from .._ops import ops
from . import cpu, cuda, matmul, op, reference
from .checks import (
    allowed_rows,
    as_tensor,
    check_database,
    check_float,
    check_ids,
    check_queries,
    check_queries_of_each,
    check_search,
)
from .result import NumpyTopK, TopK, like_queries

if TYPE_CHECKING:
    import numpy as np

IMPLS = ("auto", "cpu", "cuda", "matmul", "reference")


@overload
def ip_topk(
    queries: Tensor,
    database: Tensor | np.ndarray,
    k: int,
    *,
    allowed: Tensor | np.ndarray | None = None,
    impl: str = "auto",
) -> TopK: ...
@overload
def ip_topk(
    queries: np.ndarray,
    database: Tensor | np.ndarray,
    k: int,
    *,
    allowed: Tensor | np.ndarray | None = None,
    impl: str = "auto",
) -> NumpyTopK: ...
def ip_topk(
    queries: Tensor | np.ndarray,
    database: Tensor | np.ndarray,
    k: int,
    *,
    allowed: Tensor | np.ndarray | None = None,
    impl: str = "auto",
) -> TopK | NumpyTopK:
    """The k database rows with the largest inner product for each query, exact and identical on every implementation.

    A score is the sum of the products in float64 in one fixed order, rounded to float32
    (`valm_kernels.topk.reference.exact_scores`). Each call prepares the database, so a `FlatIPIndex` is faster for
    repeated searches. Scores have no gradient.

    Args:
        queries: (..., E) float32, float16 or bfloat16; any number, including none.
        database: (N, E), same dtypes, same device; E from 8 to 2048. Several databases of one size, such as the keys
            of each head, are (..., N, E), with queries (..., Q, E) and results (..., Q, k). A row with NaN or infinity
            raises on the CPU; a CUDA search never returns it.
        k: 1 to 1024, at most N. Above 128, a CUDA search reads the database again for every 3 or 4 queries.
        allowed: the rows that may be returned, on the device of the database: flags (N,) bool, or row numbers (n,)
            int64. If fewer than k rows are allowed, results are padded with index −1 and score −inf. On CUDA, row
            numbers out of range are undefined behaviour.
        impl: "auto" (by device), "cpu", "cuda", "matmul" (PyTorch's matrix products on any device, then exact scores
            of the candidates) or "reference" (plain PyTorch). On CUDA without native code, "auto" uses "matmul".

    Returns:
        A `TopK`, or a `NumpyTopK` for numpy queries: scores (..., k) float32 and indices (..., k) int64, best first.
        Of equal scores the row with the lower number comes first.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a wrong shape, device, k or impl, or a row that is not finite; the message says which.
        ImportError: the native code that `impl` needs is not built.

    Example:
        >>> queries, database = torch.eye(8)[:2], torch.eye(8)
        >>> valm_kernels.ip_topk(queries, database, k=1).indices
        tensor([[0],
                [1]])
    """
    rows = as_tensor(database, "database")
    check_database(rows, several=True)
    check_float(rows, "database")
    flat = as_tensor(queries, "queries")
    k = check_search(flat, rows.shape[-2], rows.shape[-1], rows.device, k)
    if rows.dim() > 2:
        check_queries_of_each(flat, rows, allowed)
    some = allowed_rows(allowed, len(rows), rows.device)
    return like_queries(queries, *search(flat, rows, None, k, impl=impl, allowed=some))


def ip_scores(
    queries: Tensor | np.ndarray,
    database: Tensor | np.ndarray,
    query_ids: Tensor | np.ndarray,
    row_ids: Tensor | np.ndarray,
) -> Tensor:
    """The exact scores of (query, row) pairs, to rerank candidates from another search.

    Scores equal those of `ip_topk` bit for bit and have no gradient. On the CPU only the named rows of a contiguous
    database are read, fastest if pairs are sorted by row. On other devices the reference implementation runs.

    Args:
        queries: (Q, E) float32, float16 or bfloat16.
        database: (N, E), same dtypes, same device; E from 8 to 2048. It may be memory-mapped.
        query_ids, row_ids: (n,) int64: pair i is queries[query_ids[i]] and database[row_ids[i]].

    Returns:
        (n,) float32. A score is not finite if its query or row is not.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a wrong shape or device, or an id out of range; the message says which.
        ImportError: the native code is not built.
        NotImplementedError: on the CPU, inside a transform of torch.func.

    Example:
        >>> rows = torch.eye(8)
        >>> valm_kernels.ip_scores(rows[:1], rows, torch.tensor([0, 0]), torch.tensor([0, 1]))
        tensor([1., 0.])
    """
    rows = as_tensor(database, "database")
    check_database(rows)
    check_float(rows, "database")
    flat = as_tensor(queries, "queries")
    check_queries(flat, rows.shape[1], rows.device)
    if flat.dim() != 2:
        raise ValueError(f"queries must have shape (Q, E), but have {tuple(flat.shape)}")
    query_ids, row_ids = as_tensor(query_ids, "query_ids"), as_tensor(row_ids, "row_ids")
    check_ids(query_ids, len(flat), rows.device, "query_ids")
    check_ids(row_ids, len(rows), rows.device, "row_ids")
    if len(query_ids) != len(row_ids):
        raise ValueError(f"query_ids has {len(query_ids)} ids and row_ids {len(row_ids)}, expected as many in each")
    compute = cpu.pair_scores if rows.device.type == "cpu" else reference.pair_scores
    return compute(flat, rows, query_ids, row_ids)


def search(
    queries: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    k: int,
    prepared: cpu.PackedRows | cuda.RowNorms | None = None,
    impl: str = "auto",
    *,
    streamed: bool = False,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dispatches checked arguments: scores and indices (..., k) of queries (..., E). If `streamed`, the rows stay in
    host memory and are copied in chunks to the queries' device.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}, expected one of {', '.join(IMPLS)}")
    if impl in ("cpu", "cuda") and rows.device.type != impl:
        raise ValueError(f"impl={impl!r} needs tensors on {impl}, but the database is on {rows.device}")
    if impl == "cuda":
        cuda.code()  # it never falls back to PyTorch
    flat = queries if queries.dim() == 2 else queries.reshape(-1, queries.shape[-1])  # [Q, E]
    if rows.dim() > 2:  # [n, Q, E] of [n, N, E]
        flat, rows = queries.flatten(0, -3), rows.flatten(0, -3)
    if impl == "reference":
        scores, indices = reference.ip_topk(flat, rows, row_scale, k, allowed)
    elif impl == "matmul":
        scores, indices = matmul.ip_topk(flat, rows, k, allowed)
    else:
        scores, indices = ops.ip_topk(flat, rows, row_scale, k, allowed, streamed, *op.tensors_of(prepared))
    if flat is queries:
        return scores, indices
    shape = (*queries.shape[:-1], k)
    return scores.reshape(shape), indices.reshape(shape)
