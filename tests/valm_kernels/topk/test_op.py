"""The torch operators: opcheck, compilation without a graph break, and fakes."""

from __future__ import annotations

import pytest
import torch

from tests.valm_kernels.topk.databases import assert_same
from valm_kernels import FlatIPIndex, ip_scores, ip_topk
from valm_kernels.int8_rows import round_rows
from valm_kernels.topk import cpu

ROWS = torch.randn(40, 16)
EQUAL_ROWS = ROWS[:1].repeat(40, 1)
ARGUMENTS = {  # behind the queries
    "float32": (ROWS, None, 5),
    "float16": (ROWS.half(), None, 5),
    "packed": (ROWS, None, 5, None, False, *cpu.pack(ROWS, None)),
    "packed, with equal rows": (EQUAL_ROWS, None, 5, None, False, *cpu.pack(EQUAL_ROWS, None)),
    "streamed": (torch.ones(40, 16, dtype=torch.int8), torch.rand(40), 5, None, True),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_opcheck(case):
    queries = torch.randn(3, 16, dtype=torch.float16 if case == "float16" else torch.float32)
    torch.library.opcheck(torch.ops.valm_kernels.ip_topk, (queries, *ARGUMENTS[case]))


def test_compiles_as_one_graph_of_any_size():
    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def search(queries, database):
        return ip_topk(queries * 2, database, 3)

    for n_queries in (4, 9):
        queries, database = torch.randn(2, n_queries, 16), torch.randn(50, 16)
        assert_same(search(queries, database), ip_topk(queries * 2, database, 3))


@pytest.mark.parametrize("streamed", [False, True])
def test_an_index_is_searched_inside_a_compiled_graph(streamed):
    index = FlatIPIndex(torch.randn(60, 16), "bfloat16", streamed=streamed)
    queries = torch.randn(5, 16)
    compiled = torch.compile(lambda q: index.search(q + 1, 4), fullgraph=True, backend="eager")
    assert_same(compiled(queries), index.search(queries + 1, 4))


SEARCHES = {
    "ip_topk": lambda index, database: lambda queries: ip_topk(queries, database, 3),
    "index": lambda index, database: lambda queries: index.search(queries, 3),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_searches_inside_transforms(search):
    """Right in batches and functionalized; scores are those of queries without their gradient, as in plain autograd."""
    database, queries = torch.randn(50, 16), torch.randn(4, 5, 16)
    search = search(FlatIPIndex(database), database)
    expected = search(queries)
    for transform in (torch.func.vmap, torch.func.functionalize):
        assert_same(transform(search)(queries), expected)
    found, tangent = torch.func.jvp(lambda q: search(q).scores, (queries,), (queries,))
    assert torch.equal(found, expected.scores) and not tangent.any()
    assert not search(queries.clone().requires_grad_()).scores.requires_grad
    gradient = torch.func.grad(lambda q: (search(q).scores[..., :1] * q).sum())(queries)
    assert torch.equal(gradient, expected.scores[..., :1].expand_as(queries))


@pytest.mark.parametrize(
    "call",
    [
        lambda queries: ip_scores(queries, queries, torch.arange(5), torch.arange(5)),
        lambda queries: FlatIPIndex(torch.ones(9, 16)).search(queries, 2).scores,
        lambda queries: round_rows(queries)[1],
    ],
)
@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.functionalize, torch.func.grad])
def test_what_no_operator_computes_says_so_inside_transforms(call, transform):
    """Functionalized tensors have the address 0, at which native code would write."""
    queries = torch.randn(2, 5, 16) if transform is torch.func.vmap else torch.randn(5, 16)
    with pytest.raises((NotImplementedError, ValueError), match=r"transform of torch\.func|under torch\.no_grad"):
        transform(lambda given: call(given).sum())(queries)
