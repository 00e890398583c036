"""One index over several devices: the result of one over all rows. Here all devices are the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.valm_kernels.topk.databases import adversarial, normals
from valm_kernels import FlatIPIndex, ShardedIPIndex


def same(found, expected):
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores.nan_to_num(7e7), expected.scores.nan_to_num(7e7))


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_result_is_that_of_one_index(parts, dtype):
    database = torch.cat([adversarial(kind, 50, 16) for kind in ("duplicates", "integers")])
    queries = normals(2, 5, 16)
    queries[1, 3, 0] = torch.nan
    index = ShardedIPIndex(database, ["cpu"] * parts, dtype)
    whole = FlatIPIndex(database, dtype)
    assert len(index) == 100 and index.dim == 16 and index.device == torch.device("cpu")
    for k in (1, 8, 40, 100):
        same(index.search(queries, k), whole.search(queries, k))


@pytest.mark.parametrize("flags", [True, False])
def test_allowed_rows(flags):
    database, queries = normals(60, 8), normals(4, 8, seed=1)
    chosen = torch.tensor([3, 19, 20, 21, 58])
    allowed = torch.zeros(60, dtype=torch.bool).index_fill_(0, chosen, True) if flags else chosen
    found = ShardedIPIndex(database, ["cpu"] * 3).search(queries, 7, allowed=allowed)
    same(found, FlatIPIndex(database).search(queries, 7, allowed=allowed))
    assert set(found.indices[:, :5].flatten().tolist()) == set(chosen.tolist())


def test_numpy_queries_get_arrays():
    database = normals(20, 8).numpy()
    found = ShardedIPIndex(database, ["cpu", "cpu"]).search(database[:3], 2)
    assert isinstance(found.scores, np.ndarray)
    assert np.array_equal(found.indices, FlatIPIndex(database).search(database[:3], 2).indices)


def test_wrong_arguments_are_named():
    database = normals(4, 8)
    with pytest.raises(ValueError, match="devices names 5 devices, expected 1 to the 4 rows"):
        ShardedIPIndex(database, ["cpu"] * 5)
    with pytest.raises(ValueError, match="devices names 0 devices"):
        ShardedIPIndex(database, [])
    with pytest.raises(TypeError, match=r"devices must be a sequence of devices, such as \['cpu'\]"):
        ShardedIPIndex(database, "cpu")
    with pytest.raises(
        ValueError, match=r"database\[2:4\], whose row 0 is row 2 of the database: database row 1 holds"
    ):
        ShardedIPIndex(torch.cat([database[:3], torch.full((1, 8), torch.nan)]), ["cpu", "cpu"])
    index = ShardedIPIndex(database, ["cpu", "cpu"])
    assert repr(index) == "ShardedIPIndex(4 rows of 8 float32 on cpu, cpu)"
    with pytest.raises(ValueError, match="k is 5, but the database has only 4 rows"):
        index.search(database, 5)
    with pytest.raises(ValueError, match="queries"):
        index.search(normals(2, 9), 1)
    with pytest.raises(ValueError, match=r"allowed must have shape \(4,\)"):
        index.search(database, 1, allowed=torch.ones(3, dtype=torch.bool))


def test_scores_have_no_gradient():
    """As if queries and database were detached, in forward mode too."""
    index, queries = ShardedIPIndex(normals(60, 8), ["cpu"] * 3), normals(4, 8, seed=1)
    assert not index.search(queries.clone().requires_grad_(), 7).scores.requires_grad
    scores, tangent = torch.func.jvp(lambda q: index.search(q, 7).scores, (queries,), (queries,))
    assert torch.equal(scores, index.search(queries, 7).scores) and not tangent.any()
