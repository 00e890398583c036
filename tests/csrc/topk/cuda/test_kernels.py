"""The CUDA kernels, run as plain C++ under several thread schedules: the reference's answer bit for bit."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.valm_kernels import roofline
from tests.csrc.topk.cuda.problems import ADVERSARIAL, adversarial
from tests.csrc.topk.cuda.simulator import ORDERS, build, copy_sources
from tests.pairwise import pairwise
from tests.valm_kernels.topk.databases import DTYPES, assert_same, normals
from valm_kernels.topk import api, cuda, index, reference
from valm_kernels.topk.index import store


@pytest.fixture(params=ORDERS)
def simulator(request, simulate, library):
    """The card of a test, once for each order of its threads."""
    return simulate(library, request.param)


def assert_exact(
    queries: torch.Tensor, rows: torch.Tensor, k: int, row_scale: torch.Tensor | None = None, *, prepared: bool = False
) -> None:
    """Of a raw tensor, or with norms found beforehand as an index has them."""
    packed = cuda.pack(rows, row_scale) if prepared else None
    assert_same(cuda.search(queries, rows, row_scale, packed, k), reference.ip_topk(queries, rows, row_scale, k))


SHAPES = (  # queries, rows, elements, k
    (1, 1, 8, 1),  # less of everything than a tile
    (1, 1700, 72, 8),  # one query, several parts
    (17, 520, 136, 17),  # blocks of 32 queries
    (70, 300, 48, 3),  # blocks of 64
    (3, 700, 40, 128),  # the largest pools of a first pass
    (2, 257, 61, 40),  # an odd number of elements, padded
    (18, 4200, 24, 8),  # many tiles of rows
    (33, 12400, 8, 40),
)


@pairwise(shape=SHAPES, dtype=DTYPES, order=ORDERS, prepared=[False, True])
def test_agrees_with_the_reference(simulate, library, order, dtype, shape, prepared):
    n_queries, n_rows, dim, k = shape
    simulator = simulate(library, order)
    rows, row_scale = store(normals(n_rows, dim, seed=1), dtype, torch.device("cpu"))
    assert_exact(normals(n_queries, dim), rows, min(k, n_rows), row_scale, prepared=prepared)
    assert simulator.redone == 0


H100, A100, CONSUMER = (kib * 1024 for kib in (227, 163, 99))  # shared memory of a block


@pytest.mark.parametrize(
    ("shared_bytes", "dtype", "dim", "n_queries", "k", "queries", "stages", "streamed"),
    [
        (H100, "float16", 768, 64, 8, 64, 4, 0),
        (H100, "int8", 768, 64, 8, 64, 4, 0),
        (H100, "float32", 768, 32, 8, 32, 4, 0),
        (H100, "float32", 512, 64, 8, 64, 4, 0),
        (H100, "float32", 768, 1, 8, 16, 3, 0),  # two blocks share a multiprocessor
        (H100, "float32", 2048, 64, 128, 64, 4, 1),
        (A100, "float16", 768, 64, 8, 64, 2, 0),
        (CONSUMER, "float16", 768, 64, 8, 32, 2, 0),
        # queries that do not fit stay in device memory
        (A100, "float32", 2048, 1, 16, 32, 4, 1),
        (CONSUMER, "float32", 1024, 1, 8, 32, 4, 1),
        (CONSUMER, "bfloat16", 1280, 64, 64, 64, 2, 1),
        (CONSUMER, "int8", 2048, 64, 128, 32, 2, 1),
        (CONSUMER, "float32", 2048, 1000, 128, 32, 2, 1),
        # or would be fewer in a block
        (H100, "float16", 768, 65, 8, 128, 4, 1),
        (H100, "float16", 768, 1024, 64, 128, 4, 1),
        (H100, "float16", 768, 1024, 100, 32, 4, 0),
        (H100, "bfloat16", 768, 1024, 8, 64, 4, 1),
        (H100, "float32", 768, 33, 8, 64, 4, 1),
        (H100, "int8", 768, 1024, 8, 64, 4, 0),
        (CONSUMER, "float16", 768, 1024, 8, 128, 2, 1),
        (CONSUMER, "float16", 1024, 64, 8, 32, 4, 1),
        (CONSUMER, "float16", 1024, 16, 8, 16, 3, 0),
    ],
)
def test_stages_that_fit(simulate, library, shared_bytes, dtype, dim, n_queries, k, queries, stages, streamed):
    simulator = simulate(library, multiprocessors=132, shared_bytes=shared_bytes)
    figures = simulator.plan(n_queries, simulator.Rows(0, 0, dtype, 1_000_000, dim), k)
    assert figures[:3] == (1, queries, stages) and figures[4] == streamed
    assert figures[3] <= shared_bytes


def test_the_arithmetic_of_gpu_md_assumes_these_blocks(simulate, library):
    simulator = simulate(library, multiprocessors=132, shared_bytes=H100)
    for queries in (2, 17, 65, *roofline.TOPK_QUERIES):
        rows = simulator.Rows(0, 0, "float16", roofline.TOPK_ROWS, roofline.TOPK_DIM)
        assert simulator.plan(queries, rows, 8)[1] == roofline.queries_of_block(queries)


@pytest.mark.parametrize(
    ("n_queries", "n_rows", "dim", "k", "dtype", "prepared"),
    [(40, 300, 2048, 100, "float32", True), (17, 4200, 450, 8, "bfloat16", False)]
    + [pytest.param(40, 300, 2048, 100, dtype, False, marks=pytest.mark.slow) for dtype in DTYPES]
    + [pytest.param(17, 4200, 450, 8, dtype, True, marks=pytest.mark.slow) for dtype in DTYPES],
)
def test_rows_too_wide_for_their_queries_to_fit(simulate, library, prepared, dtype, n_queries, n_rows, dim, k):
    """Two blocks of queries, the second with one."""
    shared_bytes = CONSUMER if k == 100 else 52 * 1024
    simulator = simulate(library, "random", multiprocessors=2, shared_bytes=shared_bytes)
    rows, row_scale = store(normals(n_rows, dim, seed=1), dtype, torch.device("cpu"))
    assert simulator.plan(n_queries, simulator.Rows(0, 0, dtype, n_rows, dim), k)[:5:4] == (1, 1)
    assert_exact(normals(n_queries, dim), rows, k, row_scale, prepared=prepared)
    assert simulator.redone == 0


@pytest.mark.parametrize(
    ("order", "k"), [("random", 8), *(pytest.param(order, 40, marks=pytest.mark.slow) for order in ORDERS)]
)
def test_128_queries_of_float16_share_a_block(simulate, library, order, k):
    """Two blocks of queries, the second with two."""
    simulator = simulate(library, order, multiprocessors=3, shared_bytes=H100)
    rows = normals(900, 72, seed=1).half()
    assert simulator.plan(130, simulator.Rows(0, 0, "float16", *rows.shape), k)[1] == 128
    assert_exact(normals(130, 72), rows, k)
    assert simulator.redone == 0


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_queries=st.integers(1, 70),
    n_rows=st.integers(1, 700),
    dim=st.integers(8, 150),
    k=st.integers(1, 128),
    dtype=st.sampled_from(list(DTYPES)),
    order=st.sampled_from(list(ORDERS)),
    multiprocessors=st.integers(1, 9),
    shared_kib=st.integers(16, 227),
    seed=st.integers(0, 99),
    prepared=st.booleans(),
)
def test_any_shape_on_any_device(
    simulate, library, n_queries, n_rows, dim, k, dtype, order, multiprocessors, shared_kib, seed, prepared
):
    simulate(library, order, seed=seed, multiprocessors=multiprocessors, shared_bytes=shared_kib * 1024)
    rows, row_scale = store(normals(n_rows, dim, seed=seed), dtype, torch.device("cpu"))
    assert_exact(normals(n_queries, dim, seed=seed + 1), rows, min(k, n_rows), row_scale, prepared=prepared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_16_bit_queries(simulator, dtype):
    assert_exact(normals(5, 64).to(dtype), normals(600, 64, seed=1).to(dtype), 8)
    assert simulator.redone == 0


@pairwise(kind=ADVERSARIAL, dtype=DTYPES, order=["rising", "random"])
def test_adversarial_rows(simulate, library, order, dtype, kind):
    simulator = simulate(library, order)
    stored, row_scale = store(adversarial(kind, 600, 40, dtype), dtype, torch.device("cpu"))
    queries = torch.stack([normals(40), normals(40, seed=3)])  # "ascending" is sorted by the first
    assert_exact(queries, stored, 8, row_scale, prepared=order == "random")
    if kind in ("equal", "duplicates"):
        assert simulator.redone == 2  # more ties than a candidate list has room for


@pytest.mark.parametrize(
    ("kind", "dtype", "prepared"),
    [
        pytest.param(kind, dtype, (row + column) % 2 == 0, marks=pytest.mark.slow if (row - column) % 4 else ())
        for row, kind in enumerate(ADVERSARIAL)
        for column, dtype in enumerate(DTYPES)
    ],
)
def test_many_adversarial_rows(simulate, library, dtype, kind, prepared):
    simulate(library, "random")
    stored, row_scale = store(adversarial(kind, 4100, 16, dtype), dtype, torch.device("cpu"))
    assert_exact(normals(17, 16), stored, 8, row_scale, prepared=prepared)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_queries(simulator, dtype):
    queries = normals(12, 40)
    queries[0] = 0
    queries[1] *= 1e-38
    queries[2] *= 1e-43  # subnormal
    queries[3] *= 1e38
    queries[4, 1:] = 0  # one element
    queries[5] *= torch.logspace(-30, 0, 40)
    queries[6, 7] = torch.nan
    queries[7, 0] = torch.inf
    queries[8] = -queries[9]
    rows, row_scale = store(normals(400, 40, seed=1), dtype, torch.device("cpu"))
    assert_exact(queries, rows, 5, row_scale)


@pytest.mark.parametrize("dim", [8, 24, 72, 2048])
@pytest.mark.parametrize("kind", ["largest", "near ties", "one large element", "scales"])
def test_int8_rows_against_the_digits_of_a_query(simulate, library, kind, dim):
    """The largest sums of integers, rows that differ by one unit, an element that leaves no digits to the others, and
    rows that differ by their scales alone.
    """
    simulator = simulate(library, "random")
    codes = normals(300, dim, seed=1).mul(40).round().clamp(-127, 127)
    scale = torch.rand(300, generator=torch.Generator().manual_seed(2)) + 0.5
    queries = normals(3, dim)
    if kind == "largest":
        codes = 127 * codes.sign()
        queries = torch.stack([torch.full((dim,), value) for value in (16383.5, 8319.0, -8064.0)])
        queries = queries * codes[:3].sign()  # the sums of some rows have one sign throughout
    if kind == "near ties":
        codes[:] = codes[0]
        codes[torch.arange(300), torch.arange(300) % dim] += torch.where(torch.arange(300) // dim % 2 == 0, 1, -1)
        scale[:] = scale[0]
    if kind == "one large element":
        queries[:, 3] = torch.tensor([1e3, -1e4, 1e7])
    if kind == "scales":
        codes[:] = codes[0]
        scale = torch.logspace(-15, 15, 300)
    assert_exact(queries, codes.to(torch.int8), 8, scale)
    if kind in ("largest", "scales"):
        assert simulator.redone == 0


@pytest.mark.slow  # it compiles
def test_what_the_digits_of_a_query_lose_is_in_the_bound(simulate, library, tmp_path):
    """A row whose score is all lost, in the direction in which Cauchy-Schwarz is sharp: a bound a tenth smaller drops
    it behind rows that the first pass ranks higher, and takes the wrong answer for proven.
    """
    query = torch.full((1, 64), 0.499)  # no digits
    query[0, :2] = torch.tensor([8192.0, 37.0])  # the first sets the unit of a digit to 1
    rows = torch.zeros(42, 64, dtype=torch.int8)
    rows[7, 2:] = 127  # score 3929, first pass 0
    rows[20, 1] = 101  # 3737
    rows[[i for i in range(42) if i not in (7, 20)], 1] = 89  # 3293, and with their bound 3608 to 3643
    scale = torch.ones(42)
    simulator = simulate(library)
    assert_exact(query, rows, 1, scale)
    sources = copy_sources(tmp_path)
    kernel = sources / "topk" / "cuda" / "kernel.cuh"
    right, wrong = "(lost + norm16 * relative) * (1 + 0x1p-20)", "(lost + norm16 * relative) * 0.9"
    assert kernel.read_text().count(right) == 1
    kernel.write_text(kernel.read_text().replace(right, wrong))
    simulator = simulate(build(tmp_path / "mutant.so", sources))
    assert cuda.search(query, rows, scale, None, 1)[1].item() == 20
    assert simulator.redone == 0


@pytest.mark.parametrize("order", ["falling", "random"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_anisotropic_rows_keep_their_proof(simulate, library, order, dtype):
    """Rows as CLIP's are, with a mean cosine of 0.8: their scores lie close together."""
    simulator = simulate(library, order)
    unit = torch.nn.functional.normalize
    values = unit(0.8**0.5 * unit(normals(512), dim=0) + 0.2**0.5 * unit(normals(2008, 512, seed=1), dim=1), dim=1)
    rows, row_scale = store(values[8:], dtype, torch.device("cpu"))
    assert_exact(values[:8], rows, 16, row_scale)
    assert simulator.redone == 0


def test_a_zero_query_needs_no_second_scan(simulator):
    assert_exact(torch.zeros(1, 64), normals(900, 64).half(), 16)
    assert simulator.redone == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_that_are_not_finite_are_never_returned(simulator, dtype):
    queries, rows = normals(3, 24), normals(300, 24, seed=1).to(DTYPES[dtype])
    clean = torch.arange(300) % 3 == 0
    broken = rows.clone()
    broken[~clean, 5] = torch.tensor([torch.nan, torch.inf, -torch.inf] * 67)[: int((~clean).sum())].to(rows.dtype)
    scores, indices = cuda.search(queries, broken, None, None, 120)
    expected_scores, expected_indices = reference.ip_topk(queries, rows[clean], None, 100)
    assert_same((scores[:, :100], indices[:, :100]), (expected_scores, 3 * expected_indices))
    assert (scores[:, 100:] == -torch.inf).all() and (indices[:, 100:] == -1).all()


@pytest.mark.parametrize("kind", ["random", "duplicates"])
def test_only_allowed_rows_are_returned(simulator, kind):
    """From the first pass, and from the exact scan, which equal rows need."""
    queries, rows = normals(3, 24), normals(300, 24, seed=1)
    if kind == "duplicates":
        rows = rows[torch.arange(300) % 3]
    allowed = torch.arange(300) % 7 > 2
    found = cuda.search(queries, rows, None, None, 8, allowed)
    assert_same(found, reference.ip_topk(queries, rows, None, 8, allowed))
    assert (simulator.redone > 0) == (kind == "duplicates")
    few = cuda.search(queries, rows, None, None, 8, torch.arange(300) == 5)
    assert few[1].tolist() == [[5] + [-1] * 7] * 3 and (few[0][:, 1:] == -torch.inf).all()


@pairwise(order=ORDERS, dtype=DTYPES, n_queries=[2, 40])
def test_many_nearly_equal_rows_need_no_scan(simulate, library, order, dtype, n_queries):
    """More than a merge keeps at first. They lie in many parts of the database, whose lists hold all of them."""
    simulator = simulate(library, order, multiprocessors=8)
    values = normals(4096, 32, seed=1)
    group = torch.randperm(4096, generator=torch.Generator().manual_seed(0))[:100]
    values[group] = 3 * normals(1, 32, seed=2) + 1e-4 * normals(100, 32, seed=3)
    rows, row_scale = store(values, dtype, torch.device("cpu"))
    assert_exact(normals(1, 32, seed=2) + 0.1 * normals(n_queries, 32), rows, 8, row_scale)
    assert simulator.redone == 0


def test_nearly_equal_rows_of_one_part_are_scanned(simulator):
    """Its list has room for 32 of them."""
    rows = normals(600, 32, seed=1)
    rows[:100] = 3 * normals(1, 32, seed=2) + 1e-4 * normals(100, 32, seed=3)
    assert_exact(normals(1, 32, seed=2), rows.half(), 8)
    assert simulator.redone == 1


def test_rows_that_are_not_finite_in_the_exact_scan(simulator):
    rows = torch.ones(300, 16)
    rows[::2, 3] = torch.inf
    scores, indices = cuda.search(torch.ones(1, 16), rows, None, None, 4)
    assert simulator.redone == 1
    assert indices.tolist() == [[1, 3, 5, 7]] and scores.tolist() == [[16.0] * 4]


@pytest.mark.parametrize(
    ("shared_kib", "dim", "k", "n_queries"),
    [
        (227, 2048, 1024, 4),
        (163, 2048, 1024, 4),
        (99, 1104, 1024, 4),
        (99, 1120, 129, 3),
        (99, 2048, 1024, 3),
        (99, 2048, 128, 4),
        (70, 2048, 1024, 2),  # no card has so little
        (40, 2048, 1024, 1),
    ],
)
def test_the_exact_scan_takes_as_many_queries_as_fit(simulate, library, shared_kib, dim, k, n_queries):
    """Long rows and large pools, in the shared memory that a card gives a block."""
    simulator = simulate(library, "random", multiprocessors=2, shared_bytes=shared_kib * 1024)
    for dtype in DTYPES:
        assert simulator.plan(7, simulator.Rows(0, 0, dtype, 700, dim), k)[5] == n_queries
    queries, rows = normals(7, dim), normals(max(700, k + 9), dim, seed=1).half()
    if k == 128:
        rows[:] = rows[torch.arange(len(rows)) % 3]  # more ties than a first pass can tell apart
    queries[5, 3] = torch.nan
    assert_exact(queries, rows, k)
    assert simulator.redone == 6


@pytest.mark.parametrize("shared_bytes", [CONSUMER, A100, H100])
def test_a_plan_fits_the_card(simulate, library, shared_bytes):
    """No kernel asks for more shared memory than a block gets, and a k of up to 128 has a first pass."""
    simulator = simulate(library, multiprocessors=84, shared_bytes=shared_bytes)
    for dtype, dim, k, n_queries in product(DTYPES, range(16, 2049, 16), (1, 17, 65, 128, 129, 1024), (1, 20, 64)):
        rows = simulator.Rows(0, 0, dtype, 1_000_000, dim)
        first_pass, *_, first_pass_shared, _, scan_queries = simulator.plan(n_queries, rows, k)
        capacity = 64 if k <= 16 else 128 if k <= 64 else 256 if k <= 128 else 2048
        assert scan_queries * (8 * dim + 8 * capacity + 12) <= shared_bytes
        assert first_pass == (k <= 128)
        assert not first_pass or first_pass_shared <= shared_bytes


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_queries", [1, 9, 30])
def test_queries_too_long_for_shared_memory_are_scanned_exactly(simulate, library, order, n_queries):
    simulator = simulate(library, order, shared_bytes=16 * 1024)
    queries = normals(n_queries, 512)
    queries[0, 0] = torch.nan
    assert_exact(queries, normals(200, 512, seed=1), 7)
    assert simulator.redone == n_queries - 1


@pytest.mark.parametrize("k", [129, 1024])
def test_more_rows_than_a_first_pass_finds_are_scored_exactly(simulator, k):
    queries, rows = normals(5, 40), normals(2200, 40, seed=1).half()
    queries[3, 0] = torch.nan
    assert_exact(queries, rows, k)
    assert simulator.redone == 4
    assert_exact(queries[:1], rows, 128)
    assert simulator.redone == 0


def test_queries_of_several_launches(simulator, monkeypatch):
    monkeypatch.setattr(cuda, "QUERIES_PER_LAUNCH", 4)
    assert_exact(normals(10, 16), normals(100, 16, seed=1), 3)
    scores, indices = cuda.search(normals(0, 16), normals(100, 16), None, None, 3)
    assert scores.shape == indices.shape == (0, 3)


def test_views_are_copied_where_the_kernels_cannot_read_them(simulator):
    queries, rows = normals(40, 5).T, normals(300, 42, seed=1).half()
    assert_exact(queries, rows[:, 1:41], 3)
    assert_exact(queries, rows.flatten()[1 : 1 + 200 * 40].view(200, 40), 3)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_that_overflow_on_the_way_lose_no_row(simulator, dtype, sign):
    """The best row's score is finite, the tensor cores' sum of its first elements is not."""
    rows = torch.zeros(200, 40)
    rows[:, 1] = torch.linspace(1, 3e36, 200)
    rows[7, [0, 32]] = sign * torch.tensor([-2e38, 2e38 + sign * 1e37])
    assert_exact(torch.full((1, 40), 1.9), rows.to(DTYPES[dtype]), 1)


def test_row_norms_are_upper_bounds(simulator):
    for dtype in DTYPES:
        rows, row_scale = store(normals(100, 40) * torch.logspace(-3, 3, 100)[:, None], dtype, torch.device("cpu"))
        exact = reference.dequantise(rows, row_scale).double().norm(dim=1)
        norms = cuda.row_norms(rows, row_scale).double()
        assert (norms >= exact).all() and (norms <= exact * (1 + 2**-19) + 2**-95).all()


def test_norms_are_found_once(simulate, library, monkeypatch):
    simulator = simulate(library)
    queries, rows = normals(3, 24), normals(200, 24, seed=1)
    row_norms = cuda.pack(rows, None)
    monkeypatch.setattr(simulator, "cuda_row_norms", None)
    assert_same(cuda.search(queries, rows, None, row_norms, 4), reference.ip_topk(queries, rows, None, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_index_fills_up_its_rows_once(simulate, library, monkeypatch, tmp_path, dtype):
    """An index on the CPU that takes it for a CUDA device: no search copies the rows."""
    simulate(library)
    monkeypatch.setattr(index, "PACKERS", {"cpu": cuda.pack})
    monkeypatch.setattr(index, "LAYOUTS", {"cpu": cuda.aligned})
    database, queries = normals(150, 13, seed=1), normals(4, 13)
    added = index.FlatIPIndex(database[:100], dtype)
    added.add(database[100:])
    itemsize = DTYPES[dtype].itemsize
    assert added.dim == 13
    assert added._stored.rows.shape == (150, 16)
    expected = reference.ip_topk(queries, added.dequantised(), None, 6)
    used = []

    def search(queries, rows, row_scale, k, allowed, streamed, *tensors):
        used.append(cuda.aligned(rows).data_ptr())
        return cuda.search(queries, rows, row_scale, cuda.RowNorms(*tensors[5:]), k, allowed)

    monkeypatch.setattr(torch.ops.valm_kernels, "ip_topk", search)
    assert_same(added.search(queries, 6), expected)
    assert used == [added._stored.rows.data_ptr()]
    assert added.bytes_per_row == 16 * itemsize + 4 + (4 if dtype == "int8" else 0)
    added.save(tmp_path)
    monkeypatch.undo()
    loaded = index.FlatIPIndex.load(tmp_path)
    assert loaded.dequantised().shape == (150, 13)
    assert torch.equal(loaded.dequantised(), added.dequantised())


def test_dispatch_by_what_is_packed():
    queries, rows, norms = (torch.empty(*shape, device="meta") for shape in ((2, 3, 24), (200, 24), (200,)))
    scores, indices = api.search(queries, rows, None, 4, cuda.RowNorms(norms))
    assert scores.shape == indices.shape == (2, 3, 4)
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64
