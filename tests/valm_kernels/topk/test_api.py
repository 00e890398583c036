"""ip_topk against its specification in float64, on odd and adversarial data, and its refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.optional_hypothesis import given, settings, st
from tests.valm_kernels.topk.databases import assert_same, normals
from valm_kernels import FlatIPIndex, ip_scores, ip_topk
from valm_kernels.topk import reference

SIZES = {
    "dim": st.integers(8, 130),
    "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    "seed": st.integers(0, 99),
}


def test_the_score_is_the_float64_sum_rounded_once():
    queries, database = normals(9, 100), normals(50, 100, seed=1)
    scores = reference.exact_scores(queries, database)
    expected = [[math.fsum((q.double() * row.double()).tolist()) for row in database] for q in queries]
    # the float64 sum is off by far less than half a float32 ulp, so at most the rounding of a near-tie differs
    assert torch.equal(scores, torch.tensor(expected, dtype=torch.float64).float())


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 700), n_queries=st.integers(0, 30), k=st.integers(1, 128), **SIZES)
def test_cpu_is_the_reference_bit_for_bit(rows, dim, n_queries, k, dtype, seed):
    k = min(k, rows)
    queries = normals(n_queries, dim, seed=seed).to(dtype)
    database = normals(rows, dim, seed=seed + 1).to(dtype)
    assert_same(ip_topk(queries, database, k, impl="cpu"), ip_topk(queries, database, k, impl="reference"))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 700),
    n_queries=st.integers(0, 9),
    k=st.integers(1, 128),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    different=st.sampled_from([1, 7, 700]),
    **SIZES,
)
def test_only_allowed_rows_are_returned(rows, dim, n_queries, k, share, different, dtype, seed):
    """Also where rows are equal, of which the first may be excluded, and where fewer than k are allowed."""
    k = min(k, rows)
    generator = torch.Generator().manual_seed(seed)
    queries = normals(n_queries, dim, seed=seed).to(dtype)
    database = normals(min(rows, different), dim, seed=seed + 1).to(dtype)
    database = database[torch.randint(len(database), (rows,), generator=generator)]
    allowed = torch.rand(rows, generator=generator) < share
    found = ip_topk(queries, database, k, allowed=allowed, impl="cpu")
    assert_same(found, ip_topk(queries, database, k, allowed=allowed, impl="reference"))
    assert_same(FlatIPIndex(database).search(queries, k, allowed=allowed), found)
    scores = reference.exact_scores(queries.float(), database.float())
    best = min(k, int(allowed.sum()))
    for query in range(n_queries):
        order = sorted(allowed.nonzero()[:, 0].tolist(), key=lambda row: (-scores[query, row].item(), row))[:best]
        assert found.indices[query].tolist() == order + [-1] * (k - best)
        assert torch.equal(found.scores[query, :best], scores[query, order])
        assert (found.scores[query, best:] == -torch.inf).all()


@pytest.mark.parametrize("impl", ["cpu", "matmul", "reference"])
def test_allowed_rows_by_flags_or_numbers(impl):
    queries, database = normals(3, 24), normals(90, 24, seed=1)
    queries[1, 4] = torch.nan
    numbers = torch.tensor([70, 3, 41, 5, 3])  # in any order, and twice
    flags = torch.zeros(90, dtype=torch.bool)
    flags[numbers] = True
    expected = ip_topk(queries, database, 6, allowed=flags, impl=impl)
    assert expected.indices[1].tolist() == [-1] * 6 and expected.scores[1].isnan().all()
    assert expected.indices[0].sort().values.tolist() == [-1, -1, 3, 5, 41, 70]
    apart = flags.repeat_interleave(2)[::2]  # stride 2
    for allowed in (numbers, numbers.numpy(), flags.numpy(), apart, apart.numpy()):
        assert_same(ip_topk(queries, database, 6, allowed=allowed, impl=impl), expected)
        assert_same(FlatIPIndex(database).search(queries, 6, allowed=allowed), expected)
    nothing = ip_topk(queries[:1], database, 2, allowed=numbers[:0], impl=impl)
    assert nothing.indices.tolist() == [[-1, -1]] and (nothing.scores == -torch.inf).all()


@pytest.mark.parametrize(
    ("allowed", "error", "message"),
    [
        ([True], TypeError, "allowed must be a torch tensor or a numpy array, but is a list"),
        (torch.ones(9), TypeError, "allowed has dtype torch.float32, expected bool"),
        (torch.ones(9, dtype=torch.int32), TypeError, "allowed has dtype torch.int32, expected bool"),
        (torch.ones(8, dtype=torch.bool), ValueError, r"allowed must have shape \(9,\) bool or \(n,\) int64, but .*8"),
        (torch.ones(9, 1, dtype=torch.bool), ValueError, r"but has shape \(9, 1\)"),
        (torch.ones(1, 1, dtype=torch.int64), ValueError, r"but has shape \(1, 1\)"),
        (torch.tensor([0, 9]), ValueError, "allowed must be from 0 to 8, but goes from 0 to 9"),
        (torch.tensor([-1]), ValueError, "allowed must be from 0 to 8, but goes from -1 to -1"),
        (torch.ones(9, dtype=torch.bool, device="meta"), ValueError, "allowed is on meta, the database is on cpu"),
    ],
)
def test_bad_allowed_rows_are_named(allowed, error, message):
    with pytest.raises(error, match=message):
        ip_topk(normals(2, 8), normals(9, 8), 3, allowed=allowed)
    with pytest.raises(error, match=message):
        FlatIPIndex(normals(9, 8)).search(normals(2, 8), 3, allowed=allowed)


@pytest.mark.parametrize("different", [1200, 30])
def test_as_many_as_1024_rows(different):
    database = normals(different, 24, seed=1)[torch.arange(1200) % different]
    queries = normals(70, 24)
    expected = ip_topk(queries, database, 1024, impl="reference")
    assert_same(ip_topk(queries, database, 1024), expected)
    assert_same(FlatIPIndex(database).search(queries, 1024), expected)


def test_ties_go_to_the_lower_row():
    database = torch.ones(300, 8)
    assert ip_topk(torch.ones(2, 8), database, 5).indices.tolist() == [[0, 1, 2, 3, 4]] * 2
    # 2^24 + 1 is no float32: the scores are equal only after rounding, and the later row's is larger before it
    database = torch.zeros(40, 8)
    database[30, 0], database[31, :2] = 2.0**24, torch.tensor([2.0**24, 1.0])
    for impl in ("cpu", "reference"):
        result = ip_topk(torch.ones(8), database, 2, impl=impl)
        assert result.indices.tolist() == [30, 31]
        assert result.scores.tolist() == [2.0**24, 2.0**24]


def test_leading_dimensions_strides_and_one_query():
    queries, database = normals(4, 24, 3, 2).transpose(0, 1).movedim(0, -1), normals(24, 60).T
    result = ip_topk(queries, database, 3)
    assert result.scores.shape == result.indices.shape == (4, 3, 2, 3)
    assert_same(result, ip_topk(queries.contiguous(), database.contiguous(), 3, impl="reference"))
    assert_same(ip_topk(queries[0, 0, 0], database, 3), (result.scores[0, 0, 0], result.indices[0, 0, 0]))


@pytest.mark.parametrize("impl", ["cpu", "matmul", "reference"])
def test_empty_and_non_finite_queries(impl):
    database = normals(20, 16)
    empty = ip_topk(torch.empty(3, 0, 16), database, 4, impl=impl)
    assert empty.scores.shape == empty.indices.shape == (3, 0, 4)
    queries = normals(4, 16)
    clean = ip_topk(queries, database, 4, impl=impl)
    queries[1, 3], queries[2, 5] = torch.nan, -torch.inf
    result = ip_topk(queries, database, 4, impl=impl)
    assert result.scores[1:3].isnan().all() and (result.indices[1:3] == -1).all()
    assert_same((result.scores[[0, 3]], result.indices[[0, 3]]), (clean.scores[[0, 3]], clean.indices[[0, 3]]))


def test_a_row_whose_float32_sum_overflows_is_finite():
    assert ip_topk(torch.zeros(64), torch.full((20, 64), 3e38), 1).scores.item() == 0


def test_numpy_in_numpy_out():
    queries, database = normals(5, 16), normals(40, 16)
    expected = ip_topk(queries, database, 3)
    frozen = database.numpy()[::-1]
    frozen.flags.writeable = False
    scores, indices = ip_topk(queries.numpy(), frozen, 3)
    assert isinstance(scores, np.ndarray) and isinstance(indices, np.ndarray)
    assert_same((torch.from_numpy(scores), torch.from_numpy(39 - indices)), expected)


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_k_may_be_a_numpy_integer(kind):
    queries, database = torch.randn(3, 16), torch.randn(40, 16)
    expected = ip_topk(queries, database, 3)
    for impl in ("auto", "matmul", "reference"):
        assert_same(ip_topk(queries, database, kind(3), impl=impl), expected)
    assert_same(FlatIPIndex(database).search(queries, kind(3)), expected)


Q, D = torch.ones(2, 16), torch.ones(5, 16)
NAN_ROW = torch.where(torch.arange(5)[:, None] == 1, torch.nan, D)
REFUSALS = {
    "k 0": (ValueError, r"k is 0, expected 1 to 1024", lambda: ip_topk(Q, D, 0)),
    "k above N": (ValueError, r"k is 6, but the database has only 5 rows", lambda: ip_topk(Q, D, 6)),
    "k above 1024": (ValueError, r"k is 1025, expected 1 to 1024", lambda: ip_topk(Q, torch.ones(2000, 16), 1025)),
    "k no int": (TypeError, r"k must be an int, but is a float", lambda: ip_topk(Q, D, 2.0)),
    "other E": (ValueError, r"queries must have shape \(\.\.\., 16\)", lambda: ip_topk(torch.ones(2, 15), D, 1)),
    "small E": (ValueError, r"E = 7, expected 8 to 2048", lambda: ip_topk(Q, torch.ones(5, 7), 1)),
    "large E": (ValueError, r"E = 2049", lambda: ip_topk(Q, torch.ones(5, 2049), 1)),
    "one row": (ValueError, r"database must have shape \(N, E\)", lambda: ip_topk(Q, torch.ones(16), 1)),
    "empty": (ValueError, r"database is empty", lambda: ip_topk(Q, torch.ones(0, 16), 1)),
    "float64": (TypeError, r"queries has dtype torch.float64", lambda: ip_topk(Q.double(), D, 1)),
    "integers": (TypeError, r"database has dtype torch.int8", lambda: ip_topk(Q, D.to(torch.int8), 1)),
    "list": (TypeError, r"queries must be a torch tensor or a numpy array, but is a list", lambda: ip_topk([1], D, 1)),
    "strings": (TypeError, r"queries must hold floating-point", lambda: ip_topk(np.array(["a"]), D, 1)),
    "masked": (TypeError, r"database has a mask", lambda: ip_topk(Q, np.ma.masked_array(D.numpy()), 1)),
    "NaN row": (ValueError, r"database row 1 holds", lambda: ip_topk(Q, NAN_ROW, 1, impl="reference")),
    "impl": (ValueError, r"impl is 'gpu', expected one of auto, cpu", lambda: ip_topk(Q, D, 1, impl="gpu")),
    "cuda on cpu": (ValueError, r"impl='cuda' needs tensors on cuda", lambda: ip_topk(Q, D, 1, impl="cuda")),
    "device": (ValueError, r"queries are on meta", lambda: ip_topk(Q.to("meta"), D, 1)),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_arguments_are_refused(case):
    error, message, call = REFUSALS[case]
    with pytest.raises(error, match=message):
        call()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 90), n_queries=st.integers(1, 9), pairs=st.integers(0, 200), **SIZES)
def test_pair_scores_are_the_specification_bit_for_bit(rows, dim, n_queries, pairs, dtype, seed):
    queries, database = normals(dim, n_queries, seed=seed).T.to(dtype), normals(dim, rows, seed=seed + 1).T.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    query_ids = torch.randint(n_queries, (pairs,), generator=generator)
    row_ids = torch.randint(rows, (pairs,), generator=generator)
    expected = reference.exact_scores(queries.float(), database.float())[query_ids, row_ids]
    assert torch.equal(ip_scores(queries, database, query_ids, row_ids), expected)
    assert torch.equal(reference.pair_scores(queries, database, query_ids, row_ids), expected)


def test_pair_scores_are_those_of_arrays_and_of_what_is_not_finite(tmp_path):
    queries, database = normals(2, 16), normals(5, 16, seed=1)
    np.save(tmp_path / "rows.npy", database.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    ids = np.array([1, 0, 1]), np.array([4, 4, 0])
    expected = ip_scores(queries, database, *map(torch.from_numpy, ids))
    assert torch.equal(ip_scores(queries.numpy(), mapped, *ids), expected)
    database[4, 7] = torch.inf
    queries[1, 2] = torch.nan
    scores = ip_scores(queries, database, *ids)
    assert scores[0].isnan() and scores[1].isinf() and scores[2].isnan()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.ones(3, 9)}, ValueError, r"queries must have shape \(\.\.\., 8\)"),
        ({"queries": torch.ones(2, 3, 8)}, ValueError, r"queries must have shape \(Q, E\)"),
        ({"queries": torch.ones(3, 8).double()}, TypeError, "queries has dtype torch.float64"),
        ({"database": torch.ones(8)}, ValueError, r"database must have shape \(N, E\)"),
        ({"row_ids": torch.tensor([0, 5])}, ValueError, "row_ids must be from 0 to 4, but goes from 0 to 5"),
        ({"query_ids": torch.tensor([-1, 0])}, ValueError, "query_ids must be from 0 to 2, but goes from -1 to 0"),
        ({"query_ids": torch.tensor([0])}, ValueError, "query_ids has 1 ids and row_ids 2"),
        ({"row_ids": torch.tensor([0.0, 1.0])}, TypeError, r"row_ids has dtype torch\.float32, expected int64"),
        ({"row_ids": np.array([0, 1], np.int32)}, TypeError, r"row_ids has dtype torch\.int32, expected int64"),
        ({"row_ids": np.array([True, False])}, TypeError, r"row_ids must hold .* int64\), but has numpy dtype bool"),
        ({"row_ids": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"row_ids must have shape \(n,\)"),
        ({"row_ids": [0, 1]}, TypeError, "row_ids must be a torch tensor or a numpy array"),
        ({"row_ids": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "row_ids is on meta"),
    ],
)
def test_pair_scores_refuse(change, error, message):
    arguments = {
        "queries": torch.ones(3, 8),
        "database": torch.ones(5, 8),
        "query_ids": torch.tensor([0, 2]),
        "row_ids": torch.tensor([4, 0]),
    }
    with pytest.raises(error, match=message):
        ip_scores(**(arguments | change))
