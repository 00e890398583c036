"""The search of GPUs without native code for them, on the CPU: it is plain PyTorch."""

from types import SimpleNamespace

import pytest
import torch

from tests.valm_kernels.topk.databases import ADVERSARIAL, adversarial, assert_same, normals
from valm_kernels import FlatIPIndex, ip_topk
from valm_kernels.topk import cuda, matmul, reference
from valm_kernels.topk.index import store

DIM = 48


def found(queries, rows, k, row_scale=None, allowed=None):
    return matmul.search(queries, rows, row_scale, matmul.row_norms(rows, row_scale), k, allowed)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    cuda._driver_takes_it.cache_clear()
    monkeypatch.setattr(matmul, "SCORES_PER_CHUNK", 500)
    monkeypatch.setattr(matmul, "QUERIES_PER_CHUNK", 7)
    monkeypatch.setattr(matmul, "VALUES_PER_CHUNK", 64 * DIM)


def some_queries(rows):
    """Ordinary ones, rows, zeros and tiny ones."""
    return torch.cat([normals(9, DIM, seed=1), rows[:3].float(), torch.zeros(2, DIM), 1e-30 * normals(2, DIM, seed=2)])


@pytest.mark.parametrize("k", [1, 5, 100])
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_the_answer_is_that_of_the_reference(kind, k):
    rows = adversarial(kind, 300, DIM)
    queries = some_queries(rows)
    assert_same(found(queries, rows, k), reference.ip_topk(queries, rows, None, k))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_stored_rows(dtype):
    rows, scale = store(normals(300, DIM), dtype, torch.device("cpu"))
    queries = normals(20, DIM, seed=1)
    assert_same(found(queries, rows, 8, scale), reference.ip_topk(queries, rows, scale, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_16_bit_products(kind, dtype):
    """Of 16-bit rows, by queries of as many bits and of more, which are rounded."""
    largest = 6e4 if dtype == torch.float16 else 3e38
    rows = adversarial(kind, 300, DIM).clamp(-largest, largest).to(dtype)
    queries = some_queries(rows)
    queries[3:6] *= torch.tensor([1e37, 1e-41, 1e5])[:, None]
    for some in (queries, queries[[0, 1, 2, 6]].to(dtype)):
        for k in (1, 5, 100):
            assert_same(ip_topk(some, rows, k, impl="matmul"), ip_topk(some, rows, k, impl="reference"))


def test_by_name_for_allowed_rows_and_several_databases():
    rows, queries = normals(4, 100, DIM), normals(4, 6, DIM, seed=1).half()
    assert_same(ip_topk(queries, rows, 5, impl="matmul"), ip_topk(queries, rows, 5))
    some = torch.arange(100) % 9 == 2
    expected = ip_topk(queries, rows[0], 20, allowed=some)
    assert_same(ip_topk(queries, rows[0], 20, allowed=some, impl="matmul"), expected)
    rows[2, 7, 3] = torch.nan
    with pytest.raises(ValueError, match="database row 7 holds NaN or infinity"):
        ip_topk(queries, rows, 5, impl="matmul")


@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, 3e-5), (torch.float16, 1e-2), (torch.bfloat16, 0.03)])
def test_products_at_the_limit_of_their_bound(monkeypatch, dtype, noise, tensor_cores):
    """Those of the best rows too small, of the others too large, by 0.95 of the bound (the rest is float32's rounding);
    half of it would not be enough.
    """
    monkeypatch.setattr(matmul, "_on_tensor_cores", lambda values: tensor_cores)
    rows, queries = (normals(1, DIM, seed=2) + noise * normals(300, DIM)).to(dtype), normals(20, DIM, seed=1)
    monkeypatch.setattr(matmul, "QUERIES_PER_CHUNK", 20)
    expected = reference.ip_topk(queries, rows, None, 8)
    among_best = torch.zeros(20, 300, dtype=torch.bool).scatter_(1, expected[1], True)
    factor = matmul._factor(queries, dtype)
    off = torch.where(among_best, -0.95, 0.95) * factor.errors(rows.double().norm(dim=1))
    planted = ((queries.double() @ rows.double().T + off) * factor.scale).float()
    starts = []

    def product(left, values):
        starts.append(starts[-1] + step if starts else 0)
        return planted[:, starts[-1] :][:, : len(values)]

    step = max(8, matmul.SCORES_PER_CHUNK // 20)
    monkeypatch.setattr(matmul, "_product", product)
    assert_same(found(queries, rows, 8), expected)
    assert starts[-1] + step >= 300
    starts.clear()
    errors = matmul._Factor.errors
    monkeypatch.setattr(matmul._Factor, "errors", lambda *given: 0.5 * errors(*given))
    with pytest.raises(AssertionError):
        assert_same(found(queries, rows, 8), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_rounding_a_query_loses_is_in_the_bound(dtype):
    """Rows along the loss, where Cauchy-Schwarz is sharp, and others."""
    queries = normals(50, DIM)
    factor = matmul._factor(queries, dtype)
    lost = queries.double() - factor.values.double() / factor.scale
    rows = torch.cat([torch.nn.functional.normalize(lost), normals(50, DIM, seed=1).double()]).to(dtype)
    products = matmul._product(factor.values, rows).double() / factor.scale
    share = (products - queries.double() @ rows.double().T).abs() / factor.errors(rows.double().norm(dim=1))
    assert share.max() < 1
    assert share.diagonal().min() > 0.9


def test_some_rows_are_allowed():
    rows, queries = normals(300, DIM), normals(20, DIM, seed=1)
    allowed = torch.zeros(300, dtype=torch.bool)
    allowed[[3, 100, 299]] = True
    for k in (2, 8):
        assert_same(found(queries, rows, k, allowed=allowed), reference.ip_topk(queries, rows, None, k, allowed))


def test_numbers_that_are_not_finite():
    rows, queries = normals(300, DIM), normals(20, DIM, seed=1)
    expected = reference.ip_topk(queries, rows[2:], None, 8)
    queries[4, 0], rows[0, 3], rows[1, 5] = torch.nan, torch.inf, torch.nan
    scores, indices = found(queries, rows, 8)
    assert scores[4].isnan().all() and (indices[4] == -1).all()
    others = torch.arange(20) != 4
    assert_same((scores[others], indices[others]), (expected[0][others], expected[1][others] + 2))


def test_products_that_overflow():
    rows, queries = 1e25 * normals(300, DIM), 1e15 * normals(20, DIM, seed=1)
    queries[:10] *= -1
    expected = reference.ip_topk(queries, rows, None, 8)
    assert expected[0].isinf().any()
    assert_same(found(queries, rows, 8), expected)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_rounded_operands(monkeypatch, precision):
    """As a GPU in TF32 or bfloat16 rounds them; with the bound of full precision the answer would be wrong."""
    rows, queries = normals(1, DIM, seed=2) + 1e-3 * normals(300, DIM), normals(20, DIM, seed=1)
    bits = 13 if precision == "high" else 16
    product = torch.Tensor.__matmul__

    def rounded(x):
        return ((x.contiguous().view(torch.int32) + (1 << (bits - 1))) >> bits << bits).view(torch.float32)

    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(rounded(a), rounded(b)))
    expected = reference.ip_topk(queries, rows, None, 8)
    with pytest.raises(AssertionError):
        assert_same(found(queries, rows, 8), expected)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert_same(found(queries, rows, 8), expected)


def test_autocast_does_not_round_the_product():
    rows, queries = normals(1, DIM, seed=2) + 1e-3 * normals(300, DIM), normals(20, DIM, seed=1)
    expected = reference.ip_topk(queries, rows, None, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(found(queries, rows, 8), expected)


def test_one_query_reads_the_rows_in_parts(monkeypatch):
    sizes = []
    values = matmul._values
    monkeypatch.setattr(matmul, "_values", lambda *given: sizes.append(values(*given)) or sizes[-1])
    found(normals(1, DIM), normals(300, DIM), 8)
    assert max(part.numel() for part in sizes) <= matmul.VALUES_PER_CHUNK


def test_a_precision_that_pytorch_cannot_tell_is_the_least(monkeypatch):
    def raises():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", raises)
    assert matmul._relative_error(DIM) > 2 * matmul.OPERAND_ERRORS["medium"]


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_a_card_older_than_the_build_has_no_code(monkeypatch, capability, has):
    """As where VALM_KERNELS_CUDA_ARCH named one card and another is there."""
    module = SimpleNamespace(built_with_cuda=True, oldest_capability=90, cuda_devices=lambda: ["a GPU"])
    monkeypatch.setattr(cuda, "native", lambda: module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert cuda.has_code(torch.device("cuda", 0)) == has


def test_a_driver_older_than_the_toolkit_leaves_the_search_to_pytorch_with_one_warning(monkeypatch):
    def fails():
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    module = SimpleNamespace(built_with_cuda=True, oldest_capability=80, cuda_devices=fails)
    monkeypatch.setattr(cuda, "native", lambda: module)
    with pytest.warns(
        UserWarning, match=r"\(CUDA driver version is insufficient .* no newer than the driver"
    ) as warned:
        assert [cuda.has_code(torch.device("cuda", 0)) for _ in range(3)] == [False] * 3
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("dtype", "on_tensor_cores", "steps"), [("float16", True, 3), ("float16", False, 8), ("float32", True, 8)]
)
def test_only_rows_that_are_copied_to_float32_are_few_at_a_time(monkeypatch, dtype, on_tensor_cores, steps):
    """500 rows of one query: 3 products of 200 scores, 8 of 64 copied rows."""
    rows, queries = normals(500, DIM).to(getattr(torch, dtype)), normals(1, DIM, seed=1)
    expected, products = reference.ip_topk(queries, rows, None, 5), []

    def product(some_queries, some_rows):
        products.append(some_rows)
        return some_queries.float() @ some_rows.float().T

    monkeypatch.setattr(matmul, "SCORES_PER_CHUNK", 200)
    monkeypatch.setattr(matmul, "_product", product)
    monkeypatch.setattr(matmul, "_on_tensor_cores", lambda factor: on_tensor_cores and factor.dtype in matmul.LARGEST)
    assert_same(found(queries, rows, 5), expected)
    assert len(products) == steps


def test_it_serves_where_the_native_code_has_no_cuda(monkeypatch):
    """With the CPU as the device."""

    def search(queries, rows, row_scale, k, allowed=None, streamed=False, *tensors):
        return cuda.search(queries, rows, row_scale, cuda.RowNorms(*tensors[5:]) if tensors else None, k, allowed)

    monkeypatch.setattr(cuda, "native", lambda: SimpleNamespace(built_with_cuda=False))
    monkeypatch.setattr(torch.ops.valm_kernels, "ip_topk", search)
    monkeypatch.setattr("valm_kernels.topk.index.PACKERS", {"cpu": cuda.pack})
    monkeypatch.setattr("valm_kernels.topk.index.LAYOUTS", {"cpu": cuda.aligned})
    rows, queries = normals(300, 50), normals(20, 50, seed=1)  # padded to 64
    expected = reference.ip_topk(queries, rows, None, 8)
    assert_same(ip_topk(queries, rows, 8), expected)
    assert_same(FlatIPIndex(rows).search(queries, 8), expected)
    with pytest.raises(ImportError, match=r"built without CUDA: .* choose impl='auto', which searches in PyTorch"):
        cuda.code()
