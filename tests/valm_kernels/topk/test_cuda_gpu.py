"""Top-K search on a CUDA device: the reference's answer bit for bit. tests/csrc/topk/cuda/ runs the same
kernels without a device.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.csrc.topk.cuda.problems import ADVERSARIAL, adversarial
from tests.valm_kernels.topk import databases
from tests.valm_kernels.topk.databases import DTYPES, normals
from valm_kernels import FlatIPIndex, TopK, ip_topk
from valm_kernels.topk import cuda, reference, streaming
from valm_kernels.topk.index import store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def assert_same(actual: TopK | tuple, expected: TopK | tuple) -> None:
    databases.assert_same(*([part.cpu() for part in result] for result in (actual, expected)))


def needs_native_code() -> None:
    """Without nvcc, PyTorch searches instead (tests/valm_kernels/topk/test_matmul.py)."""
    if not cuda.has_code(torch.device("cuda")):
        pytest.skip("the native module has no code for this card")


def norms_of(rows: torch.Tensor, row_scale: torch.Tensor | None) -> cuda.RowNorms:
    needs_native_code()
    return cuda.pack(rows, row_scale)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_queries", "n_rows", "dim", "k"),
    [
        (1, 1, 8, 1),
        (1, 50_000, 768, 8),
        (16, 20_000, 512, 16),
        (33, 9_999, 61, 40),
        (166, 30_000, 768, 8),
        (70, 20_000, 2048, 4),
        (5, 20_000, 64, 128),
        (1000, 3_000, 96, 3),
    ],
)
def test_agrees_with_the_reference(dtype, n_queries, n_rows, dim, k, prepared):
    rows, row_scale = store(normals(n_rows, dim, seed=1), dtype, torch.device("cuda"))
    queries = normals(n_queries, dim).cuda()
    packed = norms_of(rows, row_scale) if prepared else None
    assert_same(cuda.search(queries, rows, row_scale, packed, k), reference.ip_topk(queries, rows, row_scale, k))


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial_rows(kind, dtype, prepared):
    rows, row_scale = store(adversarial(kind, 40_000, 64, dtype), dtype, torch.device("cuda"))
    queries = normals(20, 64).cuda()
    queries[3] = 0
    queries[4, 2] = torch.nan
    packed = norms_of(rows, row_scale) if prepared else None
    assert_same(cuda.search(queries, rows, row_scale, packed, 8), reference.ip_topk(queries, rows, row_scale, 8))


def test_public_functions_use_it():
    queries, database = normals(2, 3, 64), normals(5000, 64, seed=1)
    expected = ip_topk(queries, database, 5)
    for impl in ("auto", "cuda") if cuda.has_code(torch.device("cuda")) else ("auto",):
        result = ip_topk(queries.cuda(), database.cuda(), 5, impl=impl)
        assert result.scores.is_cuda and result.indices.is_cuda
        assert_same(result, expected)
    index = FlatIPIndex(database, device="cuda")
    assert_same(index.search(queries.cuda(), 5), expected)
    odd = FlatIPIndex(database[:, :61], device="cuda")
    assert odd.dim == 61 and odd.bytes_per_row == 64 * 4 + 4
    assert_same(odd.search(queries[..., :61].cuda(), 5), ip_topk(queries[..., :61], database[:, :61], 5))
    index.add(10 * database[:3])
    assert_same(index.search(queries.cuda(), 5), ip_topk(queries, torch.cat([database, 10 * database[:3]]), 5))


def test_compiles_and_passes_opcheck():
    queries, database = normals(4, 32).cuda(), normals(500, 32, seed=1).cuda()
    torch.library.opcheck(torch.ops.valm_kernels.ip_topk.default, (queries, database, None, 3))
    compiled = torch.compile(lambda q, d: ip_topk(q, d, 3), fullgraph=True)
    assert_same(compiled(queries, database), ip_topk(queries, database, 3))


def test_in_a_cuda_graph_and_on_another_stream():
    queries, database = normals(4, 64).cuda(), normals(20_000, 64, seed=1).half().cuda()
    norms = norms_of(database, None)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_same(cuda.search(queries, database, None, norms, 8), ip_topk(queries, database, 8))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.search(queries, database, None, norms, 8)
    for seed in range(3):
        queries.copy_(normals(4, 64, seed=seed))
        graph.replay()
        assert_same(captured, reference.ip_topk(queries, database, None, 8))


def test_numpy_rows_on_a_device():
    database = np.random.default_rng(0).standard_normal((300, 24), dtype=np.float32)
    index = FlatIPIndex(database, dtype="float16", device="cuda")
    queries = torch.from_numpy(database[:4]).cuda()
    assert index.search(queries, 1).indices.flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dim", [64, 61])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_streamed_from_host_memory(monkeypatch, dtype, dim):
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 4096 * 64 * 2)
    database = normals(50_000, dim, seed=1)
    resident, streamed = (FlatIPIndex(database, dtype, "cuda", streamed=streamed) for streamed in (None, True))
    assert (resident.streamed, streamed.streamed) == (False, True)
    queries = normals(300, dim).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):  # the buffers of one search are free for the next
        with torch.cuda.stream(stream):
            found = streamed.search(queries, 100)
        stream.synchronize()
        assert_same(found, resident.search(queries, 100))


def test_rows_too_large_for_the_device_are_streamed(monkeypatch):
    database = normals(1000, 64)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (database.nbytes, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)
    index = FlatIPIndex(database, device="cuda")
    assert index.streamed
    queries = normals(5, 64)
    assert_same(index.search(queries.cuda(), 3), ip_topk(queries, database, 3))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("streamed", [False, True])
def test_searches_on_a_device_that_is_not_the_current_one(streamed):
    queries, database = normals(70, 64), normals(5000, 64, seed=1).half()
    index = FlatIPIndex(database, device="cuda:1", streamed=streamed)
    found = index.search(queries.to("cuda:1"), 8)
    assert found.scores.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert_same(found, ip_topk(queries, database, 8))
    assert_same(ip_topk(queries.to("cuda:1"), database.to("cuda:1"), 8), ip_topk(queries, database, 8))
