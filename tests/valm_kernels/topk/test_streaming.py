"""Rows that stay in host memory: the answer of a search without chunks, bit for bit, and every wait is needed."""

from __future__ import annotations

import pytest
import torch

from tests.valm_kernels.topk.databases import DTYPES, assert_same, normals
from tests.valm_kernels.topk.races import Streams
from valm_kernels import FlatIPIndex, ip_topk
from valm_kernels.topk import cpu, streaming


@pytest.fixture
def chunks_of(monkeypatch):
    """chunks_of(rows, dim, itemsize): from here on chunks have so many rows."""
    return lambda rows, dim, itemsize=4: monkeypatch.setattr(streaming, "CHUNK_BYTES", rows * dim * itemsize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 100, 101, 5000])
def test_chunks_change_nothing(chunks_of, dtype, chunk_rows):
    """Of one row, fewer than k, that end with the rows or leave one over; all in one."""
    database, queries = normals(101, 24), normals(6, 24, seed=1)
    queries[3, 2] = torch.nan
    chunks_of(chunk_rows, 24, DTYPES[dtype].itemsize)
    index = FlatIPIndex(database, dtype, streamed=True)
    for k in (1, 20, 101):
        assert_same(index.search(queries, k), ip_topk(queries, index.dequantised(), k, impl="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_allowed_rows_across_chunks(chunks_of, dtype):
    """In some chunks none are allowed."""
    chunks_of(16, 24, DTYPES[dtype].itemsize)
    index, queries = FlatIPIndex(normals(101, 24), dtype, streamed=True), normals(6, 24, seed=1)
    allowed = torch.tensor([3, 4, 20, 97, 98, 99])
    for k in (2, 10):
        expected = ip_topk(queries, index.dequantised(), k, allowed=allowed, impl="reference")
        assert_same(index.search(queries, k, allowed=allowed), expected)


def test_ties_across_chunks_go_to_the_lower_row(chunks_of):
    chunks_of(16, 8)
    database = torch.ones(100, 8)
    database[[15, 16, 97]] = 2
    result = FlatIPIndex(database, streamed=True).search(torch.ones(2, 8), 20)
    assert result.indices.tolist() == [[15, 16, 97, *range(15), 17, 18]] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_reach_the_device_as_its_kernels_want_them(chunks_of, monkeypatch, dtype):
    """E padded once, on the way: the search of a chunk has nothing left to copy."""
    chunks_of(20, 16, DTYPES[dtype].itemsize)
    database, queries = normals(101, 13), normals(6, 13, seed=1)
    index = FlatIPIndex(database, dtype, streamed=True)
    real, shapes = cpu.search, []

    def search(queries, rows, *arguments):
        shapes.append((queries.shape[1], rows.shape[1], rows.is_contiguous()))
        return real(queries, rows, *arguments)

    monkeypatch.setattr(cpu, "search", search)
    found = index.search(queries, 20)
    assert len(shapes) > 4 and set(shapes) == {(16, 16, True)}
    assert_same(found, ip_topk(queries, index.dequantised(), 20, impl="reference"))


def test_a_streamed_index(chunks_of, tmp_path):
    chunks_of(10, 16, 2)
    database, queries = normals(64, 16), normals(2, 3, 16, seed=1)
    plain, index = FlatIPIndex(database, "float16"), FlatIPIndex(database[:40], "float16", streamed=True)
    assert index.streamed and not plain.streamed
    assert "40 rows of 16 float16 streamed to cpu, 32 bytes a row" in repr(index)
    index.add(database[40:])
    assert_same(index.search(queries, 9), plain.search(queries, 9))
    assert index.search(queries.numpy(), 2).indices.shape == (2, 3, 2)
    assert index.search(queries[:0], 9).scores.shape == (0, 3, 9)
    index.save(tmp_path)
    loaded = FlatIPIndex.load(tmp_path, mmap=True, streamed=True)
    assert loaded.streamed and loaded.bytes_per_row == 32
    assert_same(loaded.search(queries, 9), plain.search(queries, 9))


def test_a_device_with_too_little_memory_gets_its_rows_streamed(monkeypatch):
    database = normals(1000, 16)  # 64,000 bytes, of which a device must have 80,000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70_000, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 15_000)
    allocated = {"before": 5_001}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated["before"])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    index = FlatIPIndex(database, device="cuda")
    assert index.streamed and index.device == torch.device("cuda", 3)
    assert index._stored.rows.data_ptr() == database.data_ptr()
    with pytest.raises(ValueError, match="queries are on cpu, the database is on cuda:3"):
        index.search(normals(16), 1)
    allocated["before"] = 5_000
    with pytest.raises((AssertionError, RuntimeError)):  # it fits: torch is asked to copy it to a device it has not
        FlatIPIndex(database, device="cuda")
    assert not FlatIPIndex(database).streamed


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("deaf", "races"),
    [
        (None, set()),
        ("synchronize", {("stream 2", "host")}),
        ("stream 2.wait_event", {("default", "stream 2")}),
        ("default.wait_event", {("stream 2", "default")}),
    ],
)
def test_every_wait_is_there_and_needed(monkeypatch, chunks_of, scaled, deaf, races):
    """Without any one of the three waits, one of the agents overtakes another."""
    chunks_of(10, 16, 1 if scaled else 4)
    rows = torch.arange(85 * 16).reshape(85, 16).remainder(11)
    rows, row_scale = (rows.to(torch.int8), torch.ones(85)) if scaled else (rows.float(), None)
    streams = Streams(deaf)
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    queries = normals(3, 16)
    with streams.watch([rows] if row_scale is None else [rows, row_scale]):
        found = streaming.search(queries, rows, row_scale, 4)
    assert streams.races == races
    assert_same(found, ip_topk(queries, rows.float(), 4, impl="reference"))
