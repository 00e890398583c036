"""A `FlatIPIndex` that threads share: every search returns what it does alone."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading

import pytest
import torch

from tests.threads import THREADS, at_once
from tests.valm_kernels.topk.databases import DTYPES, assert_same, normals
from valm_kernels import FlatIPIndex
from valm_kernels.topk import cpu
from valm_kernels.topk import index as index_module

DIM, K, BASE, ADDED, CHANGES = 24, 5, 2000, 500, 12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", [{}, {"pack": False}, {"streamed": True}], ids=str)
def test_a_search_returns_the_rows_that_it_began_with(dtype, option):
    """While another thread adds: the result is that of one of the states between the search's begin and end."""
    database, queries = normals(BASE + CHANGES * ADDED, DIM), normals(3, DIM, seed=1)
    sizes = range(BASE, len(database) + 1, ADDED)
    expected = {size: FlatIPIndex(database[:size], dtype).search(queries, K) for size in sizes}
    assert len({tuple(found.indices.flatten().tolist()) for found in expected.values()}) > CHANGES // 2
    index = FlatIPIndex(database[:BASE], dtype, **option)
    finished, searches = threading.Event(), []

    def add():
        for size in sizes[:-1]:
            index.add(database[size : size + ADDED])
        finished.set()

    def search():
        while True:
            last = finished.is_set()
            before = len(index)
            found = index.search(queries, K)
            searches.append((found, [size for size in sizes if before <= size <= len(index)]))
            if last:
                return

    at_once(add, *[search] * THREADS)
    assert len(index) == len(database) and len(searches) >= THREADS
    for found, possible in searches:
        assert any(all(map(torch.equal, found, expected[size])) for size in possible)


def test_no_change_is_lost():
    """Of threads that add rows with ids of their own, and remove some of them again."""
    rows = normals(THREADS * CHANGES * 20, DIM)
    ids = torch.arange(len(rows))
    index = FlatIPIndex(normals(1, DIM, seed=1), ids=torch.tensor([len(rows)]))

    def change(own):
        for some in own.split(20):
            index.add(rows[some], ids=some)
            index.remove(some[::2])
            assert set(index.search(rows[some[1::2]], 1).indices[:, 0].tolist()) <= {*ids.tolist(), len(rows)}

    at_once(*[lambda own=own: change(own) for own in ids.chunk(THREADS)])
    assert len(index) == 1 + len(rows) // 2
    kept = ids[1::2]
    expected = FlatIPIndex(rows[kept], ids=kept).search(rows[kept], 1)
    assert_same(index.search(rows[kept], 1, allowed=kept), expected)


def test_searches_at_once_pack_added_rows_once(monkeypatch):
    packed = []
    monkeypatch.setitem(index_module.PACKERS, "cpu", lambda *rows: packed.append(rows) or cpu.pack(*rows))
    database, queries = normals(BASE, DIM), normals(3, DIM, seed=1)
    index = FlatIPIndex(database[: BASE // 4])
    index.add(database[BASE // 4 :])  # too many to be packed around the first ones' centre
    found = at_once(*[lambda: index.search(queries, K)] * THREADS)
    assert len(packed) == 2
    expected = FlatIPIndex(database).search(queries, K)
    for result in found:
        assert_same(result, expected)


CALLS = {
    "search": lambda index, rows: index.search(rows, K),
    "add": lambda index, rows: index.add(rows, ids=torch.arange(len(rows)) + 100 * int(rows[0, 0])),
    "remove": lambda index, rows: index.remove(torch.tensor([int(rows[0, 0])])),
}


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs signals that do not end the process")
@pytest.mark.timeout(60)  # it would wait for ever
@pytest.mark.parametrize("handled", CALLS)
@pytest.mark.parametrize("interrupted", CALLS)
def test_a_signal_handler_uses_the_index_that_it_interrupts(monkeypatch, interrupted, handled):
    """Each at the end of its work, just before it is stored: both changes are there then."""
    database = normals(60, DIM, seed=1)
    index = FlatIPIndex(database, ids=torch.arange(60))
    index.remove(torch.tensor([0]))  # the next search packs
    new = normals(2, 3, DIM, seed=2)
    new[:, 0, 0] = torch.tensor([5.0, 6.0])  # a row to remove, and where the numbers of those that are added begin
    signals = []

    def interrupting(method):
        def call(self, *arguments):
            after = method(self, *arguments)
            if signals:
                signal.raise_signal(signals.pop())
            return after

        return call

    for name in ("_prepare", "_with", "_without"):
        monkeypatch.setattr(FlatIPIndex, name, interrupting(getattr(FlatIPIndex, name)))
    before = signal.signal(signal.SIGUSR1, lambda *_: CALLS[handled](index, new[1]))
    try:
        signals.append(signal.SIGUSR1)
        CALLS[interrupted](index, new[0])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not signals
    expected = FlatIPIndex(database[1:], ids=torch.arange(1, 60))
    CALLS[interrupted](expected, new[0])
    CALLS[handled](expected, new[1])
    queries = torch.cat([database, *new])
    assert len(index) == len(expected)
    assert_same(index.search(queries, K), expected.search(queries, K))


def test_a_failed_change_stops_no_other():
    index = FlatIPIndex(normals(5, DIM))
    with pytest.raises(ValueError, match="row 0 holds NaN"):
        index.add(torch.full((1, DIM), torch.nan))
    with pytest.raises(ValueError, match="all 5 rows would be removed"):
        index.remove(torch.arange(5))
    index.add(normals(2, DIM))
    assert len(index) == 7


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_a_copy_changes_alone(duplicate):
    database, queries = normals(60, DIM), normals(3, DIM, seed=1)
    index = FlatIPIndex(database[:50], "int8")
    other = duplicate(index)
    other.add(database[50:])
    for one, size in ((index, 50), (other, 60)):
        assert len(one) == size
        assert_same(one.search(queries, K), FlatIPIndex(database[:size], "int8").search(queries, K))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_is_forked_during_a_change_searches_and_changes(monkeypatch):
    """The thread that adds is not in the child, and there nobody would end its change."""
    database, queries = normals(60, DIM), normals(3, DIM, seed=1)
    index = FlatIPIndex(database[:40])
    changing, go_on = threading.Event(), threading.Event()
    real = index_module.store

    def store(*arguments):
        changing.set()
        assert go_on.wait(60)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "store", store)
        adding = threading.Thread(target=lambda: index.add(database[50:]))
        adding.start()
        assert changing.wait(60)
    child = os.fork()
    if child == 0:
        index.add(database[40:50])
        same = all(map(torch.equal, index.search(queries, K), FlatIPIndex(database[:50]).search(queries, K)))
        os._exit(0 if same else 1)
    try:
        assert os.waitpid(child, 0)[1] == 0
    finally:
        go_on.set()
        adding.join()
    assert len(index) == 50
