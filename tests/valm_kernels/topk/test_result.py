"""Joining the answers of shards."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.valm_kernels.topk.databases import normals
from valm_kernels import TopK, ip_topk, merge_topk


def test_merge_is_the_search_of_the_whole():
    queries, database = normals(6, 16).mul(2).round(), normals(90, 16, seed=1).round()  # with ties
    queries[4, 0] = torch.nan
    bounds = [0, 3, 40, 90]
    shards = [ip_topk(queries, database[a:b], min(8, b - a)) for a, b in pairwise(bounds)]
    whole = ip_topk(queries, database, 8)
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = merge_topk([shards[i] for i in order], [bounds[i] for i in order], 8)
        assert torch.equal(merged.indices, whole.indices)
        assert torch.equal(merged.scores.nan_to_num(7e7), whole.scores.nan_to_num(7e7))


def test_merge_fills_up_and_refuses():
    one = ip_topk(torch.ones(1, 8), torch.ones(1, 8), 1)
    missing = TopK(torch.full((1, 2), -torch.inf), torch.full((1, 2), -1))
    merged = merge_topk([missing, one], [0, 10], 3)
    assert merged.indices.tolist() == [[10, -1, -1]] and merged.scores.tolist() == [[8, -torch.inf, -torch.inf]]
    with pytest.raises(ValueError, match="2 results and 1 offsets"):
        merge_topk([one, one], [0], 1)
    with pytest.raises(ValueError, match="k is 3, expected 1 to the 2 columns"):
        merge_topk([one, one], [0, 1], 3)
    with pytest.raises(ValueError, match="different queries"):
        merge_topk([one, ip_topk(torch.ones(2, 8), torch.ones(1, 8), 1)], [0, 1], 1)


@pytest.mark.parametrize(
    ("results", "offsets", "k", "error", "message"),
    [
        (
            [TopK(torch.ones(2, 2), torch.zeros(1, 2).long())],
            [0],
            2,
            ValueError,
            "scores of shape .2, 2. and indices of",
        ),
        (
            [TopK(torch.ones(1, 3), torch.zeros(1, 2).long())],
            [0],
            2,
            ValueError,
            "scores of shape .1, 3. and indices of",
        ),
        ([TopK(torch.ones(1, 1), torch.zeros(1, 1).int())], [0], 1, TypeError, "expected float32 and int64"),
        ([TopK(torch.ones(1, 1).double(), torch.zeros(1, 1).long())], [0], 1, TypeError, "expected float32 and int64"),
        ([TopK(torch.ones(1, 1), torch.zeros(1, 1).long())], [0.5], 1, TypeError, "must be ints, got 0.5"),
        ([TopK(torch.ones(1, 1), torch.zeros(1, 1).long())], [0], 1.0, TypeError, "must be ints, got 1.0"),
        (
            [(torch.ones(1, 1), torch.zeros(1, 1).long())],
            [0],
            1,
            TypeError,
            "must be a TopK or NumpyTopK, but is a tuple",
        ),
    ],
)
def test_what_is_no_result_is_refused(results, offsets, k, error, message):
    with pytest.raises(error, match=message):
        merge_topk(results, offsets, k)
