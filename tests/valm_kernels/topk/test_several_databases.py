"""ip_topk over several databases of one size, such as the keys of each head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.threads import torch_threads
from tests.valm_kernels.topk.databases import assert_same, normals
from valm_kernels import ip_topk
from valm_kernels.native import native
from valm_kernels.topk import cuda


@pytest.mark.parametrize("isa", native().cpu_isas())
@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_is_searched_as_if_alone(isa, threads, dtype, monkeypatch):
    """Fewer databases than threads, and more; few queries, and many; a query that is not finite; equal rows."""
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    for leading, n_queries in (((2, 3), 20), ((1,), 20), ((3,), 2), ((2,), 0)):
        count = torch.Size(leading).numel()
        queries = normals(count * n_queries, 24).view(*leading, n_queries, 24).to(dtype)
        databases = normals(count * 90, 24, seed=1).view(*leading, 90, 24).to(dtype)
        databases[..., 40:50, :] = databases[..., 3:4, :]
        if n_queries:
            queries[..., 1, 5] = torch.inf
        with torch_threads(threads):
            found = ip_topk(queries, databases, 7)
        assert_same(ip_topk(queries, databases, 7, impl="reference"), found)
        assert found.scores.shape == (*leading, n_queries, 7)
        for at in np.ndindex(leading):
            alone = ip_topk(queries[at], databases[at], 7, impl="reference")
            assert_same((found.scores[at], found.indices[at]), alone)


def test_strided_databases_and_arrays():
    queries, databases = normals(2 * 5, 16).view(5, 2, 16).transpose(0, 1), normals(60, 16).view(30, 2, 16)
    found = ip_topk(queries, databases.transpose(0, 1), 3)
    assert torch.equal(found.indices[1], ip_topk(queries[1], databases[:, 1], 3).indices)
    of_arrays = ip_topk(queries.numpy(), databases.transpose(0, 1).numpy(), 3)
    assert np.array_equal(of_arrays.indices, found.indices.numpy())


def test_on_a_gpu_one_after_the_other(monkeypatch):
    """By the search in PyTorch, which needs no GPU."""
    monkeypatch.setattr(cuda, "has_code", lambda device: False)
    queries, databases = normals(12, 32).view(3, 4, 32), normals(150, 32, seed=1).view(3, 50, 32)
    assert_same(cuda.search(queries, databases, None, None, 5), ip_topk(queries, databases, 5))


def test_is_an_operator():
    queries, databases = normals(8, 16).view(2, 4, 16), normals(40, 16).view(2, 20, 16)
    torch.library.opcheck(torch.ops.valm_kernels.ip_topk.default, (queries, databases, None, 3))
    compiled = torch.compile(lambda q, d: ip_topk(q, d, 3).indices, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(queries, databases), ip_topk(queries, databases, 3).indices)


@pytest.mark.parametrize("n_queries", [1, 9])
@pytest.mark.parametrize("threads", [1, 8])
def test_a_row_that_is_not_finite_is_named(threads, n_queries):
    databases = normals(200, 16).view(2, 2, 50, 16).clone()
    databases[1, 0, 4, 3] = databases[1, 1, 2, 3] = torch.nan
    message = r"database row 4 of database 2 \(of 4, from 0\) holds NaN"
    with torch_threads(threads), pytest.raises(ValueError, match=message):
        ip_topk(normals(4 * n_queries, 16).view(2, 2, n_queries, 16), databases, 3)


@pytest.mark.parametrize(
    ("queries", "databases", "message"),
    [
        ((3, 7, 16), (2, 3, 50, 16), r"queries must have shape \(2, 3, Q, 16\), .* but have \(3, 7, 16\)"),
        ((2, 4, 7, 16), (2, 3, 50, 16), r"queries must have shape \(2, 3, Q, 16\)"),
        ((2, 3, 7, 24), (2, 3, 50, 16), r"queries must have shape \(\.\.\., 16\)"),
        ((0, 7, 16), (0, 50, 16), "database is empty"),
        ((2, 7, 16), (2, 4, 16), "k is 5, but the database has only 4 rows"),
        ((16,), (16,), r"database must have shape \(N, E\) or \(\.\.\., N, E\)"),
    ],
)
def test_wrong_shapes(queries, databases, message):
    with pytest.raises(ValueError, match=message):
        ip_topk(torch.zeros(queries), torch.zeros(databases), 5)


def test_rows_of_several_databases_cannot_be_excluded():
    with pytest.raises(ValueError, match="allowed names rows of one database"):
        ip_topk(torch.zeros(2, 1, 16), torch.zeros(2, 9, 16), 3, allowed=torch.ones(9, dtype=torch.bool))
