"""Joining the answers of shards."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.valm_kernels.topk.databases import assert_same, normals
from valm_kernels import TopK, ip_topk, merge_topk


def test_merge_is_the_search_of_the_whole():
    queries, database = normals(6, 16).mul(2).round(), normals(90, 16, seed=1).round()  # with ties
    queries[4, 0] = torch.nan
    bounds = [0, 3, 40, 90]
    shards = [ip_topk(queries, database[a:b], min(8, b - a)) for a, b in pairwise(bounds)]
    whole = ip_topk(queries, database, 8)
    for order in ([0, 1, 2], [2, 0, 1]):
        assert_same(merge_topk([shards[i] for i in order], [bounds[i] for i in order], 8), whole)


ONE = ip_topk(torch.ones(1, 8), torch.ones(1, 8), 1)


def test_merge_fills_up():
    missing = TopK(torch.full((1, 2), -torch.inf), torch.full((1, 2), -1))
    merged = merge_topk([missing, ONE], [0, 10], 3)
    assert merged.indices.tolist() == [[10, -1, -1]] and merged.scores.tolist() == [[8, -torch.inf, -torch.inf]]


@pytest.mark.parametrize(
    ("results", "offsets", "k", "error", "message"),
    [
        ([ONE, ONE], [0], 1, ValueError, "2 results and 1 offsets"),
        ([ONE, ONE], [0, -8], 1, ValueError, "an offset is -8, expected 0 to"),
        ([ONE, ONE], [0, 2**63 - 1], 1, ValueError, f"an offset is {2**63 - 1}, expected 0 to"),
        ([ONE, ONE], [0, 1], 3, ValueError, "k is 3, expected 1 to the 2 columns"),
        ([ONE, ip_topk(torch.ones(2, 8), torch.ones(1, 8), 1)], [0, 1], 1, ValueError, "the same queries"),
        ([TopK(torch.ones(2, 1), ONE.indices)], [0], 1, ValueError, "scores of shape .2, 1. and indices of"),
        ([TopK(torch.ones(1, 3), ONE.indices)], [0], 1, ValueError, "scores of shape .1, 3. and indices of"),
        ([TopK(ONE.scores, ONE.indices.int())], [0], 1, TypeError, "expected float32 and int64"),
        ([TopK(ONE.scores.double(), ONE.indices)], [0], 1, TypeError, "expected float32 and int64"),
        ([ONE], [0.5], 1, TypeError, "must be ints, got 0.5"),
        ([ONE], [0], 1.0, TypeError, "must be ints, got 1.0"),
        ([tuple(ONE)], [0], 1, TypeError, "must be a TopK or NumpyTopK, but is a tuple"),
    ],
)
def test_what_is_no_result_is_refused(results, offsets, k, error, message):
    with pytest.raises(error, match=message):
        merge_topk(results, offsets, k)
