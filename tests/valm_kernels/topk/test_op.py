"""The torch operators: opcheck, compilation without a graph break, and fakes."""

from __future__ import annotations

import pytest
import torch

from valm_kernels import ip_topk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype):
    arguments = (torch.randn(3, 16).to(dtype), torch.randn(40, 16).to(dtype), None, 5)
    torch.library.opcheck(torch.ops.valm_kernels.ip_topk, arguments)


def test_compiles_as_one_graph_of_any_size():
    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def search(queries, database):
        return ip_topk(queries * 2, database, 3)

    for n_queries in (4, 9):
        queries, database = torch.randn(2, n_queries, 16), torch.randn(50, 16)
        result, expected = search(queries, database), ip_topk(queries * 2, database, 3)
        assert torch.equal(result.indices, expected.indices)
        assert torch.equal(result.scores, expected.scores)
