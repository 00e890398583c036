"""Rounding rows, scaling integer products, and a whole layer, against the operations of PyTorch that they replace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.optional_hypothesis import given, settings, st
from tests.threads import torch_threads
from tests.valm_kernels.guard_pages import guarded, needs_guard_pages
from valm_kernels.int8_rows import linear_rows, round_rows, scale_products_
from valm_kernels.native import native

ISAS = native().cpu_isas()
# Around the vectors of each instruction set and the pairs and fours of them that a compiler makes of one loop.
WIDTHS = st.one_of(st.integers(1, 140), st.sampled_from([512, 768, 2048, 3072]))


def rounded_by_torch(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    least, largest = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = ((largest - least) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = ((rows - least) / step).round().sub(128).to(torch.int8)
    return rounded, step[:, 0], (least + 128 * step)[:, 0]


def scaled_in_float64(products: Tensor, step: Tensor, zero: Tensor, scale: Tensor, sum: Tensor, bias: Tensor) -> Tensor:
    return bias + step[:, None].double() * scale * products + zero[:, None].double() * sum


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def drawn(count: int, width: int, outputs: int, seed: int) -> list[Tensor]:
    """Products of int8 rows of `width` numbers, and step, zero, scale, sum and bias."""
    generator = torch.Generator().manual_seed(seed)
    rows, weights = (
        torch.randint(-128, 128, shape, generator=generator) for shape in ((count, width), (outputs, width))
    )
    floats = [torch.randn(n, generator=generator) for n in (count, count, outputs, outputs, outputs)]
    return [(rows @ weights.T).int(), floats[0].abs(), floats[1], floats[2].abs(), *floats[3:]]


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(0, 9),
    width=WIDTHS,
    # subnormal numbers, steps that the smallest normal number bounds, and ranges near the largest number
    size=st.sampled_from([1e-42, 1e-38, 1e-36, 1e-3, 1.0, 1e4, 3e37]),
    kind=st.sampled_from(["both signs", "one sign", "constant", "zeros", "ties"]),
    seed=st.integers(0, 1000),
)
def test_rounding_is_bit_for_bit_that_of_torch(isa, count, width, size, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator).clamp(-4, 4) * size
    if kind == "one sign":
        rows = torch.nn.functional.gelu(rows)
    elif kind == "constant":
        rows = rows[:, :1].expand(count, width)
    elif kind == "zeros":
        rows = rows.sign() * 0.0  # of both signs
    elif kind == "ties":
        rows = torch.randint(0, 511, (count, width), generator=generator) / 2
        rows[:, :2] = torch.tensor([0.0, 255.0])[:width]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VALM_KERNELS_ISA", isa)
        assert_same(round_rows(rows), rounded_by_torch(rows))


def layer(count: int, width: int, outputs: int, seed: int) -> list[Tensor]:
    """Rows, and the weights, scale, sum and bias of a layer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (outputs, width), generator=generator).to(torch.int8)
    floats = [torch.randn(outputs, generator=generator) for _ in range(3)]
    return [torch.randn(count, width, generator=generator), weight, *floats]


def in_three_calls(rows: Tensor, weight: Tensor, *of_weights: Tensor) -> Tensor:
    rounded, step, zero = round_rows(rows)
    return scale_products_((rounded.long() @ weight.long().T).int(), step, zero, *of_weights)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(count=st.integers(0, 9), width=WIDTHS, outputs=st.integers(0, 140), seed=st.integers(0, 1000))
def test_a_layer_in_one_call_has_the_bits_of_three(isa, count, width, outputs, seed):
    tensors = layer(count, width, outputs, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VALM_KERNELS_ISA", isa)
        assert torch.equal(linear_rows(*tensors), in_three_calls(*tensors))


@pytest.mark.parametrize("isa", ISAS)
def test_a_layer_of_the_largest_products(isa, monkeypatch):
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    for ends in ([0.0, 1.0], [-1.0, 0.0]):  # nearly all 127, or -128
        rows, weight = torch.full((2, 3072), ends[1]), torch.full((5, 3072), -127, dtype=torch.int8)
        rows[:, 0] = ends[0]
        tensors = [rows, weight, *torch.ones(3, 5)]
        assert torch.equal(linear_rows(*tensors), in_three_calls(*tensors))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 7, 16, 40, 131])
def test_what_is_not_finite_stays_in_its_row(isa, width, monkeypatch):
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    good = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
    expected = round_rows(good)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in {0, width // 2, width - 1}:
            rows = good.clone()
            rows[1, place] = bad
            rounded, step, zero = round_rows(rows)
            assert step[1].isnan() and zero[1].isnan()
            assert_same((rounded[::2], step[::2], zero[::2]), tuple(each[::2] for each in expected))
            products, _, _, *weights = drawn(3, width, 33, 0)
            out = scale_products_(products, step, zero, *weights)
            assert out[1].isnan().all() and out[::2].isfinite().all()
            _, *of_layer = layer(3, width, 33, 0)
            out = linear_rows(rows, *of_layer)
            assert out[1].isnan().all() and torch.equal(out[::2], linear_rows(good, *of_layer)[::2])


def test_a_range_that_is_too_large_for_float32_is_seen():
    rows = torch.tensor([[-3e38, 1.0, 3e38]])
    _, step, zero = round_rows(rows)
    assert step.isinf().all() and zero.isinf().all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(count=st.integers(0, 9), width=st.integers(1, 200), outputs=WIDTHS, seed=st.integers(0, 1000))
def test_scaling_is_exact_up_to_float32(isa, count, width, outputs, seed):
    products, *factors = drawn(count, width, outputs, seed)
    step, zero, scale, sum, bias = factors
    expected = scaled_in_float64(products, *factors)
    # of the three terms, each rounded a few times
    size = bias.abs() + step[:, None] * scale * products.abs() + (zero[:, None] * sum).abs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VALM_KERNELS_ISA", isa)
        out = scale_products_(products, *factors)
    assert out.dtype == torch.float32 and out.data_ptr() == products.data_ptr()
    assert ((out - expected).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()


@needs_guard_pages
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("width", [1, 19, 131])
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_read_or_written_beside_a_tensor(isa, width, side, monkeypatch):
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
    assert_same(round_rows(guarded(rows, side)), round_rows(rows))
    tensors = drawn(3, 40, width, 0)
    found = scale_products_(*(guarded(each, side) for each in tensors))
    assert torch.equal(found, scale_products_(*tensors))
    for outputs in (3, 40):
        tensors = layer(3, width, outputs, 0)
        assert torch.equal(linear_rows(*(guarded(each, side) for each in tensors)), linear_rows(*tensors))


def test_threads_do_not_change_a_bit():
    rows = torch.randn(777, 131, generator=torch.Generator().manual_seed(0))
    products, *factors = drawn(777, 131, 77, 1)
    of_layer = layer(5, 131, 777, 2)
    found = []
    for threads in (1, 2):
        with torch_threads(threads):
            found.append((*round_rows(rows), scale_products_(products.clone(), *factors), linear_rows(*of_layer)))
    assert_same(*found)
    assert_same(found[0][:3], rounded_by_torch(rows))


def test_rows_that_are_not_contiguous():
    rows = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    for view in (rows.T, rows[::3, 5:], rows[:, ::2], rows[:1].expand(6, 30)):
        assert_same(round_rows(view), rounded_by_torch(view.contiguous()))
        _, *of_layer = layer(0, view.shape[1], 9, 1)
        assert torch.equal(linear_rows(view, *of_layer), linear_rows(view.contiguous(), *of_layer))


@pytest.mark.parametrize(
    "rows", [torch.zeros(2, 3).double(), torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 3, device="meta")]
)
def test_other_rows_are_refused(rows):
    for function in (round_rows, lambda rows: linear_rows(rows, *layer(0, 3, 4, 0)[1:])):
        with pytest.raises(ValueError, match=r"rows must be float32 \(n, W\) on CPU with W > 0, got torch\.float"):
            function(rows)


def test_a_gradient_is_refused():
    rows = torch.randn(2, 3, requires_grad=True)
    for function in (round_rows, lambda rows: linear_rows(rows, *layer(0, 3, 4, 0)[1:])):
        with pytest.raises(ValueError, match="no gradient"):
            function(rows)
    with torch.no_grad():
        round_rows(rows)


@pytest.mark.parametrize(
    ("function", "good", "first", "names"),
    [
        (scale_products_, drawn(4, 5, 6, 0), 0, ["products", "step", "zero", "scale", "sum", "bias"]),
        (linear_rows, layer(4, 6, 5, 0), 1, ["weight", "scale", "sum", "bias"]),
    ],
)
def test_other_arguments_are_refused(function, good, first, names):
    for place, name in enumerate(names, first):
        other = good[place]
        doubled = other.repeat_interleave(2, -1)
        for wrong in (other.double(), doubled[..., ::2], other.to("meta"), other[None] if place == 0 else doubled):
            with pytest.raises(ValueError, match=rf"{name} must be {other.dtype} \("):
                function(*good[:place], wrong, *good[place + 1 :])
    function(*good)
