"""A block's step in one native call, against the operations of PyTorch that it replaces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.optional_hypothesis import given, settings, st
from tests.threads import torch_threads
from tests.tolerance import assert_accurate
from tests.valm_kernels.guard_pages import guarded, needs_guard_pages
from valm_kernels.int8_rows import Int8Layer
from valm_kernels.native import native
from valm_kernels.text_block import Int8TextBlock

ISAS = native().cpu_isas()


def quick_gelu_of(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def norm_of(width: int, generator: torch.Generator) -> torch.nn.LayerNorm:
    norm = torch.nn.LayerNorm(width).requires_grad_(False)
    norm.weight.normal_(1, 0.2, generator=generator)
    norm.bias.normal_(0, 0.2, generator=generator)
    return norm


def layer_of(width: int, outputs: int, generator: torch.Generator) -> Int8Layer:
    weight = torch.randint(-127, 128, (outputs, width), generator=generator).to(torch.int8)
    scale = (torch.rand(outputs, generator=generator) + 0.5) / 64 / width**0.5
    return Int8Layer(weight, scale, weight.sum(1) * scale, torch.randn(outputs, generator=generator) / 4)


def block_of(heads: int, head_dim: int, inner: int, quick_gelu: bool = False, seed: int = 0) -> Int8TextBlock:
    generator, width = torch.Generator().manual_seed(seed), heads * head_dim
    sizes = ((width, 3 * width), (width, width), (width, inner), (inner, width))
    layers = [layer_of(*size, generator) for size in sizes]
    return Int8TextBlock(heads, [norm_of(width, generator) for _ in range(2)], layers, quick_gelu)


def inputs_of(block: Int8TextBlock, streams: int, texts: int, past: int, seed: int = 1) -> list[Tensor]:
    """hidden, keys and values."""
    generator, head_dim = torch.Generator().manual_seed(seed), block.width // block.heads
    shapes = ((streams, texts, block.width), *[(texts, block.heads, past, head_dim)] * 2)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def by_torch(
    block: Int8TextBlock, hidden: Tensor, keys: Tensor, values: Tensor, first_key: Tensor | None, first_out: int
) -> tuple[Tensor, Tensor]:
    """The block's output and the projected tokens, in the precision of `hidden`."""
    dtype, weights = hidden.dtype, iter(block.weights)
    norms = [(next(weights).to(dtype), next(weights).to(dtype), eps) for eps in block.eps]
    layers = [Int8Layer(*(next(weights) for _ in range(4))) for _ in range(4)]

    def linear(rows: Tensor, layer: Int8Layer) -> Tensor:
        least, largest = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        step = ((largest - least) / 255).clamp(min=torch.finfo(torch.float32).tiny)
        rounded = ((rows - least) / step).round() * step + least
        return rounded @ (layer.weight.to(dtype) * layer.scale.to(dtype)[:, None]).T + layer.bias.to(dtype)

    projected = linear(F.layer_norm(hidden, (block.width,), *norms[0]), layers[0])
    streams, texts, past = *hidden.shape[:2], keys.shape[2]
    # (3, N, H, S, D)
    q, k, v = projected.unflatten(-1, (3, block.heads, -1)).permute(2, 1, 3, 0, 4)
    place = torch.arange(past + streams)
    first = torch.zeros(texts, 1) if first_key is None else first_key
    seen = (place <= past + torch.arange(streams)[:, None]) & (place >= first[:, None, None])
    keys, values = torch.cat([keys.to(dtype), k], 2), torch.cat([values.to(dtype), v], 2)
    mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)  # (N, H, S, D)
    out = hidden + linear(mixed.permute(2, 0, 1, 3).flatten(2), layers[1])
    inner = linear(F.layer_norm(out, (block.width,), *norms[1]), layers[2])
    out = out + linear(quick_gelu_of(inner) if block.quick_gelu else F.gelu(inner), layers[3])
    return torch.cat([hidden[:first_out], out[first_out:]]), projected


def assert_as_by_torch(block: Int8TextBlock, inputs: list[Tensor], first_key: Tensor | None, first_out: int) -> None:
    eager = by_torch(block, *inputs, first_key, first_out)
    exact = by_torch(block, *(tensor.double() for tensor in inputs), first_key, first_out)
    hidden = inputs[0].clone()
    projected = block.step(hidden, *inputs[1:], first_key=first_key, first_out=first_out)
    for name, found, *others in zip(("hidden", "projected"), (hidden, projected), eager, exact, strict=True):
        # a number on the edge between two of the 256 steps may be rounded to the other one
        assert_accurate(name, found, *others, precision=torch.float16)
    assert torch.equal(hidden[:first_out], inputs[0][:first_out])


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([1, 2, 5]),
    head_dim=st.sampled_from([1, 4, 16, 20, 33, 64]),
    inner=st.sampled_from([1, 31, 96]),
    streams=st.sampled_from([1, 2]),
    texts=st.integers(0, 3),
    past=st.sampled_from([0, 1, 7, 40]),
    hides=st.booleans(),
    quick_gelu=st.booleans(),
    seed=st.integers(0, 100),
)
def test_a_step_is_that_of_torch(isa, heads, head_dim, inner, streams, texts, past, hides, quick_gelu, seed):
    block = block_of(heads, head_dim, inner, quick_gelu, seed)
    first_key = torch.arange(texts, dtype=torch.int32)[:, None].clamp(max=past) if hides else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VALM_KERNELS_ISA", isa)
        for first_out in range(streams):
            assert_as_by_torch(block, inputs_of(block, streams, texts, past, seed), first_key, first_out)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_activation_of_any_number(isa, quick_gelu, monkeypatch):
    """The inner numbers of the MLP are x and 0: the ends of a range, which the rounding leaves as they are."""
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    x = torch.cat([torch.linspace(-9, 9, 901), torch.tensor([1e-30, -1e-30, -50, -1e4, -1e30])])
    silent = Int8Layer(torch.zeros(3, 1, dtype=torch.int8), *torch.zeros(3, 3))
    first = Int8Layer(*(tensor[:1] for tensor in silent))
    inner, bias = Int8Layer(torch.zeros(2, 1, dtype=torch.int8), *torch.zeros(3, 2)), torch.zeros(2)
    out = Int8Layer(torch.tensor([[1, 0]], dtype=torch.int8), torch.ones(1), torch.ones(1), torch.zeros(1))
    norms = [norm_of(1, torch.Generator()) for _ in range(2)]
    block = Int8TextBlock(1, norms, [silent, first, inner._replace(bias=bias), out], quick_gelu)
    found = torch.zeros(len(x), 1, 1)
    past = torch.zeros(2, 1, 1, 0, 1)
    for place, number in enumerate(x):
        bias[0] = number
        block.step(found[place : place + 1], *past)
    activation = quick_gelu_of if quick_gelu else F.gelu
    assert_accurate("activation", found[:, 0, 0], activation(x), activation(x.double()))


@pytest.mark.parametrize("isa", ISAS)
def test_a_text_does_not_depend_on_the_others(isa, monkeypatch):
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    block = block_of(3, 20, 70)
    hidden, keys, values = inputs_of(block, 2, 3, 9)
    hidden[:, 1], keys[1, 0, 0, 0] = torch.nan, torch.inf
    together = hidden.clone()
    block.step(together, keys, values)
    for text in range(3):
        alone = hidden[:, text : text + 1].clone()
        block.step(alone, keys[text : text + 1], values[text : text + 1])
        assert torch.equal(alone.nan_to_num(7), together[:, text : text + 1].nan_to_num(7))
        assert alone.isnan().all() if text == 1 else alone.isfinite().all()


def test_keys_that_are_a_part_of_a_cache():
    block = block_of(2, 8, 24)
    hidden, keys, values = inputs_of(block, 2, 3, 30)
    of_tokens = keys.transpose(1, 2).contiguous().transpose(1, 2)
    assert not of_tokens.is_contiguous()
    for view in (lambda x: x[:, :, 11:], lambda x: x[::2, :, ::3], lambda x: x.new_empty(0).set_(of_tokens)):
        some = view(keys)
        found, expected = (hidden[:, : len(some)].clone() for _ in range(2))
        block.step(found, some, view(values))
        block.step(expected, some.contiguous(), view(values).contiguous())
        assert torch.equal(found, expected)


def test_norms_that_are_cast_afterwards_stay_as_they_were():
    norms, block = [norm_of(16, torch.Generator()) for _ in range(2)], block_of(2, 8, 24)
    layers = [Int8Layer(*block.weights[first : first + 4]) for first in range(4, 20, 4)]
    block = Int8TextBlock(2, norms, layers, False)
    hidden, keys, values = inputs_of(block, 2, 3, 5)
    found, expected = hidden.clone(), hidden.clone()
    block.step(expected, keys, values)
    torch.nn.ModuleList(norms).bfloat16()
    block.step(found, keys, values)
    assert torch.equal(found, expected)


def test_threads_do_not_change_a_bit():
    block = block_of(8, 64, 2048)
    hidden, keys, values = inputs_of(block, 2, 4, 70)
    found = []
    for threads in (1, 2):
        with torch_threads(threads):
            found.append(hidden.clone())
            block.step(found[-1], keys, values)
    assert torch.equal(*found)


@needs_guard_pages
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_read_or_written_beside_a_tensor(isa, side, monkeypatch):
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    for head_dim, inner in ((5, 19), (16, 48)):
        block = block_of(3, head_dim, inner)
        inputs = inputs_of(block, 2, 2, 7)
        expected = inputs[0].clone()
        block.step(expected, *inputs[1:])
        found, *past = (guarded(tensor, side) for tensor in inputs)
        block.weights = [guarded(weight, side) for weight in block.weights]
        block.step(found, *past, first_key=guarded(torch.zeros(2, 1, dtype=torch.int32), side))
        assert torch.equal(found, expected)


def test_other_arguments_are_refused():
    block = block_of(2, 8, 24)
    hidden, keys, values = inputs_of(block, 2, 3, 5)
    first_key = torch.zeros(3, 1, dtype=torch.int32)
    for wrong in (hidden.double(), hidden[..., :8], hidden.to("meta"), hidden.transpose(0, 1)):
        with pytest.raises(ValueError, match=r"hidden must be torch\.float32 \("):
            block.step(wrong, keys, values)
    for wrong in (
        keys.double(),
        keys[:2],
        keys.to("meta"),
        keys.transpose(2, 3),
        keys.repeat_interleave(2, -1)[..., ::2],
    ):
        with pytest.raises(ValueError, match=r"keys must be float32 \(3, 2, ., 8\) on CPU"):
            block.step(hidden, wrong, values)
    with pytest.raises(ValueError, match=r"values must be float32 \(3, 2, 5, 8\) on CPU"):
        block.step(hidden, keys, values[:, :, 1:])
    for wrong in (first_key.long(), first_key[:2], first_key[:, 0]):
        with pytest.raises(ValueError, match=r"first_key must be torch\.int32 \(3, 1\)"):
            block.step(hidden, keys, values, first_key=wrong)
    for streams, first_out in ((1, 1), (2, 2), (2, -1), (3, 0), (0, 0)):
        with pytest.raises(ValueError, match="one or two streams"):
            block.step(hidden.repeat(2, 1, 1)[:streams], keys, values, first_out=first_out)
    with pytest.raises(ValueError, match="no gradient"):
        block.step(hidden.requires_grad_(), keys, values)


def test_other_weights_are_refused():
    good = block_of(2, 8, 24)
    layers = [Int8Layer(*good.weights[first : first + 4]) for first in range(4, 20, 4)]
    norms = [norm_of(16, torch.Generator()) for _ in range(2)]
    Int8TextBlock(2, norms, layers, False)
    for place in range(4):
        for name, tensor in layers[place]._asdict().items():
            for wrong in (tensor.double(), tensor[1:], tensor.to("meta")):
                others = [*layers[:place], layers[place]._replace(**{name: wrong}), *layers[place + 1 :]]
                with pytest.raises(ValueError, match=" must be torch"):
                    Int8TextBlock(2, norms, others, False)
    with pytest.raises(ValueError, match=r"weight must be torch\.int8 \(16, 16\)"):  # one layer in two places
        Int8TextBlock(2, norms, [layers[0], layers[3], layers[2], layers[3]], False)
    with pytest.raises(ValueError, match="weight and bias of a norm must be"):
        Int8TextBlock(2, [norms[0], torch.nn.LayerNorm(15)], layers, False)
    with pytest.raises(ValueError, match="a width of 16 is not of 3 heads"):
        Int8TextBlock(3, norms, layers, False)
