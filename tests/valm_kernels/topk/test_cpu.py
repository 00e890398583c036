"""The native search on every instruction set this machine has: exact on adversarial data, on every path; its memory,
its threads, its interruption.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from tests.threads import torch_threads
from tests.valm_kernels.guard_pages import guarded, needs_guard_pages
from tests.valm_kernels.topk.databases import ADVERSARIAL, DTYPES, adversarial, assert_same, normals
from valm_kernels import FlatIPIndex, ip_scores, ip_topk
from valm_kernels.native import native
from valm_kernels.topk import cpu
from valm_kernels.topk.index import store

ISAS = native().cpu_isas()


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("VALM_KERNELS_ISA", request.param)
    return request.param


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_exact_whatever_the_data(isa, kind):
    """Packed in an index, packed in the call, and as float32 (few queries), each against the specification."""
    dim, k = 72, 8
    database, queries = adversarial(kind, 1500, dim), normals(19, dim)
    queries[0] = normals(dim)  # what "ascending" is sorted by
    expected = ip_topk(queries, database, k, impl="reference")
    assert_same(FlatIPIndex(database).search(queries, k), expected)
    assert_same(ip_topk(queries, database, k), expected)
    for i in range(3):
        assert_same(ip_topk(queries[i], database, k), (expected.scores[i], expected.indices[i]))


@pytest.mark.parametrize("threads", [1, 2])
def test_equal_scores_in_blocks_that_are_read_out_of_order(isa, threads):
    """Seven blocks of 3,616 rows; the first rows of a score stand in any of them, often before the k-th best so far."""
    database, queries = adversarial("nearly equal", 25_000, 72), normals(5, 72)
    expected = ip_topk(queries, database, 8, impl="reference")
    with torch_threads(threads):
        assert_same(FlatIPIndex(database).search(queries, 8), expected)
        assert_same(ip_topk(queries, database, 8), expected)
        assert_same(ip_topk(queries[:2], database, 8), (expected.scores[:2], expected.indices[:2]))


@pytest.mark.parametrize("seed", [0, 5])
def test_rows_before_the_kth_best_enter_where_a_buffer_has_filled(isa, seed):
    """Of seven blocks the first, fifth and second are read in this order. The fifth has k rows of the best score. In
    the second, 400 rows just below it fill the buffer, and behind them stand rows of that score, which come first.
    """
    dim, k, block = 72, 8, 3616
    pool, query = adversarial("nearly equal", 200_000, dim), normals(1, dim, seed=seed + 10)
    scores = ip_scores(query, pool, torch.zeros(len(pool), dtype=torch.int64), torch.arange(len(pool)))
    values, counts = scores.unique(return_counts=True)
    at = max(at for at in range(2, len(values)) if counts[at] >= 60 and counts[at - 1] >= 400)
    best, below, rest = (pool[scores == values[at]], pool[scores == values[at - 1]], pool[scores < values[at - 1]])
    database = rest[torch.arange(7 * block) % len(rest)]
    database[4 * block :][:k] = best[:k]
    database[block:][:400] = below[:400]
    database[block + 400 :][:40] = best[k:][:40]
    expected = ip_topk(query, database, k, impl="reference")
    assert expected.indices.tolist() == [[*range(block + 400, block + 400 + k)]]
    for threads in (1, 2):
        with torch_threads(threads):
            assert_same(FlatIPIndex(database).search(query, k), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_of_pairs_are_those_of_a_search(isa, dtype):
    database, queries = adversarial("six decades", 300, 77).to(dtype), normals(9, 77)
    best = ip_topk(queries, database, 20)
    query_ids, row_ids = torch.arange(9).repeat_interleave(20), best.indices.flatten()
    assert torch.equal(ip_scores(queries, database, query_ids, row_ids), best.scores.flatten())


@pytest.mark.parametrize("scale", [1e-41, 1e-20, 1e20, 1e37])
def test_exact_whatever_the_size_of_a_query(isa, scale):
    database, queries = normals(600, 40), normals(5, 40, seed=1) * scale
    queries[4] = 0
    expected = ip_topk(queries, database, 8, impl="reference")
    assert_same(FlatIPIndex(database).search(queries, 8), expected)
    assert_same(ip_topk(queries[:2], database, 8), (expected.scores[:2], expected.indices[:2]))


def test_partial_sums_that_overflow_lose_no_row(isa):
    """Of the best row a part of the bound is below every float32, the whole is not."""
    database = torch.zeros(3, 8)
    database[:, :2] = torch.tensor([[3e37, -1e37], [2e37, 1e37], [-2e37, 0.0]])
    query = torch.tensor([1, 0.1, 0, 0, 0, 0, 0, 0])
    assert FlatIPIndex(database).search(query, 1).indices.tolist() == [0]

    # float32 products: more rows than are scored before the threshold rises
    database = normals(600, 16) * 1e-38
    database[-1] = torch.tensor([-2.0] + [1.0] * 15)
    query = torch.full((16,), 3e38)
    expected = ip_topk(query, database, 1, impl="reference")
    assert expected.indices.tolist() == [599]
    assert_same(ip_topk(query, database, 1), expected)


@pytest.mark.parametrize(("n_queries", "dim"), [(33, 64), (70, 200), (700, 16), (1030, 132)])
def test_queries_of_several_tiles_and_groups(isa, n_queries, dim):
    """A tile is of 4 to 32 queries, a group of 256 or 1,024; AMX's matrices hold 64 numbers of a row."""
    database, queries = normals(330, dim), normals(n_queries, dim, seed=1)
    if n_queries > 256:
        queries[[3, 255, 256, -1], 5] = torch.nan
    expected = ip_topk(queries, database, 5, impl="reference")
    assert_same(FlatIPIndex(database).search(queries, 5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 33, 250, 2048])
def test_exact_for_every_stored_dtype_and_odd_sizes(isa, dtype, dim):
    database = normals(170, dim) + normals(dim, seed=2)
    index = FlatIPIndex(database, dtype)
    queries = normals(7, dim, seed=1)
    expected = ip_topk(queries, index.dequantised(), 128, impl="reference")
    assert_same(index.search(queries, 128), expected)
    assert_same(index.search(queries[0], 1), (expected.scores[0, :1], expected.indices[0, :1]))
    plain = FlatIPIndex(database, dtype, pack=False)
    assert_same(plain.search(queries, 128), expected)
    assert_same(plain.search(queries[:2], 128), (expected.scores[:2], expected.indices[:2]))


@needs_guard_pages
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("dim", [8, 60, 72, 133])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_beside_rows_and_their_codes(isa, dtype, dim, side):
    """Of matrices of 16 steps, 2, 15, 18 and 34 steps fill less than one, and not the last."""
    rows, queries = guarded(normals(70, dim).to(dtype), side), guarded(normals(19, dim, seed=1), side)
    packed = cpu.PackedRows(*(None if x is None else guarded(x, side) for x in cpu.pack(rows, None)))
    expected = ip_topk(queries, rows, 5, impl="reference")
    assert_same(cpu.search(queries, rows, None, packed, 5), expected)
    assert_same(cpu.search(queries, rows, None, None, 5), expected)
    assert_same(cpu.search(queries[:2], rows, None, None, 5), (expected.scores[:2], expected.indices[:2]))


def test_a_best_row_that_its_own_bound_hardly_saves(isa):
    """A row along what rounding left of the query, and across all else of it: the first pass misses all of its score
    that the bound allows. Where the bound were a tenth too small it would be lost.
    """
    dim = 2048  # of many elements, 16-bit kernels leave more too
    of_bytes = isa in ("amxint8", "avx512vnni", "tiles")
    levels = 127 if of_bytes else min(32767, 2**31 // (256 * dim) - 1)  # csrc/topk/cpu/query.cpp
    database, queries = normals(1500, dim), normals(5, dim, seed=1)
    frame = cpu.pack(database, None).frame.double()  # of a sample of the rows, the last not among them
    generator = torch.Generator().manual_seed(2)
    changes = torch.randint(-1, 2, (200, dim), generator=generator).double()
    for query in queries:
        rest = query.double() - (query.double() @ frame[1]).float() * frame[1]
        unit = rest.abs().max() / levels
        left = rest - unit * (rest / unit).round()
        known = query.double() - left
        across = left - left @ known / (known @ known) * known
        codes = (127 * across / across.abs().max()).round()  # a row that its own bytes hold exactly
        candidates = codes + changes * (codes.abs() < 126)
        codes = candidates[(candidates @ known).abs().argmin()]
        best_other = (database[:-1].double() @ query.double()).max()
        step = (best_other * 1.02 - query.double() @ frame[0]) / (query.double() @ codes)
        assert step > 0
        database[-1] = (frame[0] + step * codes).float()
        expected = ip_topk(query, database, 1, impl="reference")
        assert expected.indices.item() == 1499
        assert_same(FlatIPIndex(database).search(query, 1), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_denormal_numbers_count_where_the_caller_has_switched_them_off(isa, dtype):
    """torch.set_flush_denormal holds for the calling thread only: threads would disagree."""
    scale = 1e-6 if dtype == "float16" else 1e-37 if dtype == "int8" else 1e-40
    database, queries = normals(1500, 40, seed=1) * scale, normals(9, 40) * 1e10
    torch.set_flush_denormal(True)
    try:
        index = FlatIPIndex(database, dtype)
        one, found = index.search(queries[0], 8), [index.search(queries, 8)]
        if dtype != "int8":
            found.append(ip_topk(queries, database.to(DTYPES[dtype]), 8))
    finally:
        torch.set_flush_denormal(False)
    expected = ip_topk(queries, index.dequantised(), 8, impl="reference")
    assert_same(one, (expected.scores[0], expected.indices[0]))
    for each in found:
        assert_same(each, expected)


@pytest.mark.timeout(60)
def test_copies_of_a_row_at_many_scales_are_told_apart():
    """As int8, rows in one direction differ by their scales alone. Pair by pair so many would take minutes."""
    copies = normals(1, 8) * torch.linspace(1, 2, 400_000)[:, None]
    assert cpu.pack(*store(copies, "int8", torch.device("cpu"))).first_rows is None


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_answer_does_not_depend_on_the_threads(threads):
    """Many blocks, taken out of order, and many ties between them."""
    database, queries = (normals(20_000, 128, seed=1) / 2).round(), normals(8, 128).round()
    index = FlatIPIndex(database)
    expected = ip_topk(queries, database, 20, impl="reference")
    with torch_threads(threads):
        assert_same(index.search(queries, 20), expected)
        assert_same(ip_topk(queries, database, 20), expected)
        assert_same(ip_topk(queries[0], database, 20), (expected.scores[0], expected.indices[0]))


@pytest.mark.parametrize("n_queries", [1, 9])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_row_is_refused_in_the_call_that_packs(isa, value, n_queries):
    database = normals(3000, 413)  # several blocks
    database[2777, 412], database[2888, 1] = value, torch.nan
    with pytest.raises(ValueError, match="database row 2777 holds NaN or infinity"):
        ip_topk(normals(n_queries, 413), database, 2)


class Stopped(Exception):
    """Raised by a signal's handler."""


def stop_in_native_code(call) -> None:
    """Calls `call(begin)`, which calls `begin` right before native code: another thread then sends a signal, which
    has its turn only where the GIL is released, and the signal's handler ends the call."""

    def stop(*_):
        raise Stopped

    begun = threading.Event()
    sender = threading.Thread(target=lambda: (begun.wait(), os.kill(os.getpid(), signal.SIGUSR1)))
    before, interval = signal.signal(signal.SIGUSR1, stop), sys.getswitchinterval()
    sender.start()
    try:
        sys.setswitchinterval(1000)
        with pytest.raises(Stopped):
            call(begun.set)
    finally:
        sys.setswitchinterval(interval)
        begun.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("databases", [1, 4])
def test_a_signal_of_another_thread_ends_a_search(monkeypatch, databases):
    """Other threads of Python run during a search, and the last of the results is not written."""
    rows, queries = normals(databases * 20_000, 128), normals(databases * 10_000, 128, seed=1)
    real, unfinished = native().ip_topk_cpu, []

    def search(begin):
        def ip_topk_cpu(*arguments):
            _, n_queries, _, n_databases, _, k, *_, indices, _ = arguments
            last = ctypes.c_int64.from_address(indices + 8 * (n_databases * n_queries * k - 1))
            last.value = -7
            try:
                begin()
                return real(*arguments)
            finally:
                unfinished.append(last.value == -7)

        monkeypatch.setattr(native(), "ip_topk_cpu", ip_topk_cpu)
        ip_topk(queries.view(databases, -1, 128), rows.view(databases, -1, 128), 32)

    with torch_threads(2):
        stop_in_native_code(search)
    assert unfinished == [True]


OTHER = FlatIPIndex(normals(40, 24), "int8")


@pytest.mark.parametrize(
    ("kind", "handle"),
    [
        ("anisotropic", lambda: OTHER.search(normals(3, 24), 4)),
        ("anisotropic", lambda: ip_topk(normals(9, 17), normals(50, 17), 4)),
        ("denormal", lambda: torch.set_flush_denormal(True)),
    ],
    ids=["searches", "packs and searches", "flushes denormal numbers"],
)
def test_a_search_goes_on_after_a_signal_handler(monkeypatch, kind, handle):
    """Tiles hold other shapes then, or a thread other rules of arithmetic."""
    monkeypatch.setenv("VALM_KERNELS_ISA", "tiles")  # slow enough to be asked for signals
    database, queries = adversarial(kind, 40_000 if kind == "denormal" else 100_000, 72), normals(20, 72)
    index = FlatIPIndex(database)
    searches = [lambda: index.search(queries, 8), lambda: ip_topk(queries, database, 8)]
    handled = []
    before = signal.signal(signal.SIGVTALRM, lambda *_: handled.append(handle()))
    try:
        with torch_threads(1):
            for search in searches:
                expected = search()
                handled.clear()
                signal.setitimer(signal.ITIMER_VIRTUAL, 0.01, 0.01)
                found = search()
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                assert handled
                torch.set_flush_denormal(False)
                assert_same(found, expected)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("step", ["find_duplicates", "pack"])
def test_a_signal_ends_packing(step):
    """Both halves of building an index: what they write last is not written."""
    rows = torch.randint(-127, 128, (6_000_000, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    row_scale = torch.rand(len(rows))
    numbers = torch.full((2, len(rows)), -7, dtype=torch.int32)
    codes, frame = torch.empty(187_500 * 256, dtype=torch.uint8), torch.empty(2, 8)
    stats = torch.full((187_500 * 128,), -7.0)
    native_rows = cpu._native_rows(rows, row_scale)
    place = cpu._native_packed_rows(cpu.PackedRows(codes, stats, frame), len(rows))
    pointers = [part.data_ptr() for part in numbers]

    def step_of(begin):
        begin()
        if step == "pack":
            native().pack(native_rows, place, 0, "generic", 1)
        else:
            native().find_duplicates(native_rows, 1, *pointers)

    stop_in_native_code(step_of)
    assert (numbers if step == "find_duplicates" else stats).flatten()[-1] == -7


# Sets the most memory that a process may have beside what it has now; files that it maps do not count.
LIMIT = """
import ctypes, resource, sys, numpy as np, torch
from valm_kernels import FlatIPIndex, ip_topk
def limit(extra):
    ctypes.CDLL(None).malloc_trim(0)
    (now,) = [int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData")]
    resource.setrlimit(resource.RLIMIT_DATA, (now + extra, now + extra))
    try: bytearray(extra + (1 << 20))
    except MemoryError: return
    sys.exit("the limit does not hold")
queries = torch.randn(600, 128)
ip_topk(queries, queries, 128)  # threads have their stacks from here on
"""
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and limits memory as Linux does")


@pytest.mark.slow  # it starts a process
@needs_linux
@pytest.mark.parametrize("rows", [20_000, 1_000_000])
def test_working_memory_stays_below_64_mib(rows):
    code = LIMIT + (
        f"database = torch.randn({rows}, 128)\n"
        "index = FlatIPIndex(database)\n"
        "limit((64 << 20) + 2 * 600 * 128 * 12)  # and the answers\n"
        "found = index.search(queries, 128), ip_topk(queries, database, 128)\n"
        "assert torch.equal(found[0].indices, found[1].indices)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow  # it starts a process
@needs_linux
@pytest.mark.parametrize("packed", [True, False])
def test_a_database_larger_than_memory_is_searched_where_its_file_is(tmp_path, packed):
    rows = 200_000  # 49 MiB of float16, 24 MiB of packed copy
    database = normals(rows, 128, seed=1).half()
    np.save(tmp_path / "shard.npy", database.numpy())
    FlatIPIndex(database).save(tmp_path / "index")
    index = {
        True: "FlatIPIndex.load(sys.argv[1] + '/index', mmap=True)",
        False: "FlatIPIndex(np.load(sys.argv[1] + '/shard.npy', mmap_mode='r'), pack=False)",
    }[packed]
    code = LIMIT + (
        f"index = {index}\n"
        "limit(16 << 20)\n"
        "queries = torch.arange(5 * 128).reshape(5, 128).sin()\n"
        "print(index.search(queries, 4).indices.tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    queries = torch.arange(5 * 128).reshape(5, 128).sin()
    assert done.stdout.strip() == str(ip_topk(queries, database, 4).indices.tolist()), done.stderr


@pytest.mark.slow  # it starts a process
@needs_linux
def test_a_file_larger_than_memory_becomes_int8(tmp_path):
    np.save(tmp_path / "shard.npy", normals(400_000, 128, seed=1).half().numpy())  # 98 MiB
    code = LIMIT + (
        "rows = np.load(sys.argv[1] + '/shard.npy', mmap_mode='r')\n"
        "limit(rows.size + (32 << 20))\n"
        "print(len(FlatIPIndex(rows, 'int8', pack=False)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.stdout.strip() == "400000", done.stderr
