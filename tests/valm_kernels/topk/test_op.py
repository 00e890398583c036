"""The torch operators: opcheck, compilation without a graph break, and fakes."""

from __future__ import annotations

import pytest
import torch

from valm_kernels import FlatIPIndex, ip_topk
from valm_kernels.topk import cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype):
    arguments = (torch.randn(3, 16).to(dtype), torch.randn(40, 16).to(dtype), None, 5)
    torch.library.opcheck(torch.ops.valm_kernels.ip_topk, arguments)


@pytest.mark.parametrize("equal_rows", [False, True])
def test_opcheck_packed(equal_rows):
    database = torch.randn(1, 16).repeat(40, 1) if equal_rows else torch.randn(40, 16)
    arguments = (torch.randn(3, 16), database, None, *cpu.pack(database, None), 5)
    torch.library.opcheck(torch.ops.valm_kernels.packed_ip_topk, arguments)


def test_opcheck_streamed():
    arguments = (torch.randn(3, 16), torch.ones(40, 16, dtype=torch.int8), torch.rand(40), 5)
    torch.library.opcheck(torch.ops.valm_kernels.streamed_ip_topk, arguments)


def test_compiles_as_one_graph_of_any_size():
    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def search(queries, database):
        return ip_topk(queries * 2, database, 3)

    for n_queries in (4, 9):
        queries, database = torch.randn(2, n_queries, 16), torch.randn(50, 16)
        result, expected = search(queries, database), ip_topk(queries * 2, database, 3)
        assert torch.equal(result.indices, expected.indices)
        assert torch.equal(result.scores, expected.scores)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_index_is_searched_inside_a_compiled_graph(streamed):
    index = FlatIPIndex(torch.randn(60, 16), "bfloat16", streamed=streamed)
    queries = torch.randn(5, 16)
    compiled = torch.compile(lambda q: index.search(q + 1, 4), fullgraph=True, backend="eager")
    result, expected = compiled(queries), index.search(queries + 1, 4)
    assert torch.equal(result.indices, expected.indices)
    assert torch.equal(result.scores, expected.scores)
