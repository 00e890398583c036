"""The blocks' step in one native call, against the operations of PyTorch that it replaces."""

from __future__ import annotations

import itertools

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
from valm_kernels.text_blocks import FloatLayer, TextBlock, TextBlocks

ISAS = native().cpu_isas()


def quick_gelu_of(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def norm_of(width: int, generator: torch.Generator) -> torch.nn.LayerNorm:
    norm = torch.nn.LayerNorm(width).requires_grad_(False)
    norm.weight.normal_(1, 0.2, generator=generator)
    norm.bias.normal_(0, 0.2, generator=generator)
    return norm


def int8_layer(width: int, outputs: int, generator: torch.Generator) -> Int8Layer:
    weight = torch.randint(-127, 128, (outputs, width), generator=generator).to(torch.int8)
    scale = (torch.rand(outputs, generator=generator) + 0.5) / 64 / width**0.5
    return Int8Layer(weight, scale, weight.sum(1) * scale, torch.randn(outputs, generator=generator) / 4)


def float_layer(width: int, outputs: int, generator: torch.Generator) -> FloatLayer:
    weight = torch.randn(outputs, width, generator=generator) / width**0.5
    return FloatLayer(weight, torch.randn(outputs, generator=generator) / 4)


LAYERS = [pytest.param(int8_layer, id="int8"), pytest.param(float_layer, id="float32")]


def blocks_of(make_layer, heads: int, head_dim: int, inner: int, quick_gelu: bool = False, seed: int = 0) -> TextBlocks:
    generator, width = torch.Generator().manual_seed(seed), heads * head_dim

    def block() -> TextBlock:
        of_attention = [make_layer(width, outputs, generator) for outputs in (3 * width, width)]
        of_mlp = [make_layer(width, inner, generator), make_layer(inner, width, generator)]
        return TextBlock(norm_of(width, generator), *of_attention, norm_of(width, generator), *of_mlp)

    return TextBlocks([block(), block()], heads, quick_gelu)


def inputs_of(blocks: TextBlocks, rows: int, texts: int, past: int, seed: int = 1) -> list[Tensor]:
    """hidden and past."""
    generator, head_dim = torch.Generator().manual_seed(seed), blocks.width // blocks.heads
    shapes = ((rows, blocks.width), (len(blocks.blocks), 2, texts, blocks.heads, past, head_dim))
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def linear(rows: Tensor, layer: FloatLayer | Int8Layer) -> Tensor:
    dtype = rows.dtype
    if isinstance(layer, FloatLayer):
        return rows @ layer.weight.to(dtype).T + layer.bias.to(dtype)
    least, largest = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    step = ((largest - least) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = ((rows - least) / step).round() * step + least
    return rounded @ (layer.weight.to(dtype) * layer.scale.to(dtype)[:, None]).T + layer.bias.to(dtype)


def by_torch(
    blocks: TextBlocks, hidden: Tensor, lengths: list[int], past: Tensor, *, eot_after: list[int], first_key: list[int]
) -> tuple[Tensor, Tensor]:
    """What `TextBlocks.step` returns, in the precision of `hidden`."""

    def normed(rows: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
        weight, bias = norm.weight.to(rows.dtype), norm.bias.to(rows.dtype)
        return F.layer_norm(rows, (blocks.width,), weight, bias, norm.eps)

    text = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))  # (T,)
    every = []
    for block, (keys, values) in zip(blocks.blocks, past.to(hidden.dtype), strict=True):
        projected = linear(normed(hidden, block.attention_norm), block.attention_in)
        every.append(projected)
        q, k, v = projected.unflatten(-1, (3, blocks.heads, -1)).permute(1, 2, 0, 3)  # (H, T + A, D)
        mixed = torch.zeros_like(hidden)
        for row in range(len(hidden)):
            token = row if row < len(text) else eot_after[row - len(text)]
            n, first = text[token], first_key[text[token]] if first_key else 0
            new = [at for at in range(token + 1) if text[at] == n] + ([row] if row >= len(text) else [])
            seen = [torch.cat([old[n, :, first:], own[:, new]], 1) for old, own in ((keys, k), (values, v))]
            mixed[row] = F.scaled_dot_product_attention(q[:, row, None], *seen).flatten()
        hidden = hidden + linear(mixed, block.attention_out)
        inner = linear(normed(hidden, block.mlp_norm), block.mlp_in)
        hidden = hidden + linear(quick_gelu_of(inner) if blocks.quick_gelu else F.gelu(inner), block.mlp_out)
    return hidden[len(text) :] if eot_after else hidden, torch.stack(every)


@pytest.mark.parametrize("make_layer", LAYERS)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([1, 2, 5]),
    head_dim=st.sampled_from([1, 4, 16, 20, 33, 64]),
    inner=st.sampled_from([1, 31, 96]),
    texts=st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=3),
    past=st.sampled_from([0, 1, 7, 40]),
    hides=st.booleans(),
    quick_gelu=st.booleans(),
    seed=st.integers(0, 100),
)
def test_a_step_is_that_of_torch(isa, make_layer, heads, head_dim, inner, texts, past, hides, quick_gelu, seed):
    blocks = blocks_of(make_layer, heads, head_dim, inner, quick_gelu, seed)
    lengths, numbers = [length for length, _ in texts], itertools.accumulate(length for length, _ in texts)
    # behind the last token of some texts, and then behind the very first too
    eot_after = [number - 1 for number, (_, asks) in zip(numbers, texts, strict=True) if asks]
    eot_after += [0] if eot_after else []
    hidden, past = inputs_of(blocks, sum(lengths) + len(eot_after), len(texts), past, seed)
    first_key = [min(text, past.shape[4]) for text in range(len(texts))] if hides else []
    options = {"eot_after": eot_after, "first_key": first_key}
    eager = by_torch(blocks, hidden, lengths, past, **options)
    exact = by_torch(blocks, hidden.double(), lengths, past.double(), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VALM_KERNELS_ISA", isa)
        found = blocks.step(hidden, lengths, past, **options)
    # a number on the edge between two of the 256 steps may be rounded to the other one, of which an output has a share
    precision = torch.bfloat16 if make_layer is int8_layer else torch.float32
    for name, *results in zip(("states", "projected"), found, eager, exact, strict=True):
        assert_accurate(name, *results, precision=precision)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_activation_of_any_number(isa, quick_gelu, monkeypatch):
    """The inner numbers of the MLP are its bias."""
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    x = torch.cat([torch.linspace(-9, 9, 901), torch.tensor([1e-30, -1e-30, -50, -1e4, -1e30])])
    silent, one = torch.zeros(3, 1), torch.zeros(1, 1)
    bias, norms = torch.zeros(1), [norm_of(1, torch.Generator()) for _ in range(2)]
    layers = [
        FloatLayer(silent, torch.zeros(3)),
        FloatLayer(one, torch.zeros(1)),
        FloatLayer(one, bias),
        FloatLayer(one + 1, torch.zeros(1)),
    ]
    blocks = TextBlocks([TextBlock(norms[0], *layers[:2], norms[1], *layers[2:])], 1, quick_gelu)
    past, found = torch.zeros(1, 2, 1, 1, 0, 1), []
    for number in x:
        bias[0] = number
        found.append(blocks.step(torch.zeros(1, 1), [1], past)[0])
    activation = quick_gelu_of if quick_gelu else F.gelu
    assert_accurate("activation", torch.cat(found)[:, 0], activation(x), activation(x.double()))


@pytest.mark.parametrize("make_layer", LAYERS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_text_does_not_depend_on_the_others(isa, make_layer, monkeypatch):
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    blocks = blocks_of(make_layer, 3, 20, 70)
    lengths, eot_after = [2, 1, 3], [1, 2, 4, 5]
    rows = [[0, 1, 6], [2, 7], [3, 4, 5, 8, 9]]
    hidden, past = inputs_of(blocks, 10, 3, 9)
    hidden[rows[1]], past[0, 0, 1, 0, 0] = torch.nan, torch.inf
    together, _ = blocks.step(hidden.clone(), lengths, past, eot_after=eot_after)
    for text, (eots, place) in enumerate((([1], [0]), ([0], [1]), ([1, 2], [2, 3]))):
        alone, _ = blocks.step(hidden[rows[text]], lengths[text : text + 1], past[:, :, [text]], eot_after=eots)
        assert torch.equal(alone.nan_to_num(7), together[place].nan_to_num(7))
        assert alone.isnan().all() if text == 1 else alone.isfinite().all()


def test_keys_that_are_a_part_of_a_cache():
    blocks = blocks_of(int8_layer, 2, 8, 24)
    hidden, past = inputs_of(blocks, 6, 3, 30)
    for some in (past[..., 11:, :], past[:, :, ::2, :, ::3], past.transpose(3, 4).contiguous().transpose(3, 4)):
        assert not some.is_contiguous()
        lengths = [2] * some.shape[2]
        rows = hidden[: sum(lengths)]
        found, expected = (blocks.step(rows.clone(), lengths, one)[0] for one in (some, some.contiguous()))
        assert torch.equal(found, expected)


def test_weights_that_change_afterwards():
    norms, generator = [norm_of(16, torch.Generator()) for _ in range(2)], torch.Generator().manual_seed(0)
    modules = [torch.nn.Linear(*size) for size in ((16, 48), (16, 16), (16, 24), (24, 16))]
    layers = [FloatLayer(module.weight, module.bias) for module in modules]
    blocks = TextBlocks([TextBlock(norms[0], *layers[:2], norms[1], *layers[2:])], 2, False)
    hidden, past = inputs_of(blocks, 3, 3, 5)
    past = past[:1]
    everything = torch.nn.ModuleList(norms + modules).requires_grad_(False)

    def read() -> Tensor:
        return blocks.step(hidden.clone(), [1] * 3, past)[0]

    read()
    for parameter in everything.parameters():
        parameter.normal_(generator=generator)  # in place
        parameter.data = parameter.data.clone()  # or in another place
    norms[0].load_state_dict({name: 2 * tensor for name, tensor in norms[0].state_dict().items()}, assign=True)
    expected = by_torch(blocks, hidden, [1] * 3, past, eot_after=[], first_key=[])[0]
    torch.testing.assert_close(read(), expected, rtol=1e-5, atol=1e-4)
    for part, of in ((norms[1], "weight and bias of a norm"), (modules[2], "weight")):
        part.bfloat16()
        with pytest.raises(ValueError, match=rf"{of} must be torch\.float32"):
            read()
        part.float()
    read()


@pytest.mark.parametrize("make_layer", LAYERS)
def test_threads_do_not_change_a_bit(make_layer):
    blocks = blocks_of(make_layer, 8, 64, 2048)
    hidden, past = inputs_of(blocks, 8, 4, 70)
    found = []
    for threads in (1, 2):
        with torch_threads(threads):
            found.append(blocks.step(hidden.clone(), [2] * 4, past)[0])
    assert torch.equal(*found)


@needs_guard_pages
@pytest.mark.parametrize("make_layer", LAYERS)
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_read_or_written_beside_a_tensor(isa, side, make_layer, monkeypatch):
    monkeypatch.setenv("VALM_KERNELS_ISA", isa)
    for head_dim, inner in ((5, 19), (16, 48)):
        blocks = blocks_of(make_layer, 3, head_dim, inner)
        inputs = inputs_of(blocks, 5, 2, 7)
        expected = blocks.step(inputs[0].clone(), [2, 1], inputs[1], eot_after=[1, 2])
        guards = [TextBlock(*(guarded_part(part, side) for part in block)) for block in blocks.blocks]
        hidden, past = (guarded(tensor, side) for tensor in inputs)
        found = TextBlocks(guards, 3, False).step(hidden, [2, 1], past, eot_after=[1, 2])
        assert all(map(torch.equal, found, expected))


def guarded_part(part, side):
    if not isinstance(part, torch.nn.LayerNorm):
        return type(part)(*(guarded(tensor, side) for tensor in part))
    part.weight.data, part.bias.data = guarded(part.weight.data, side), guarded(part.bias.data, side)
    return part


def test_other_arguments_are_refused():
    blocks = blocks_of(int8_layer, 2, 8, 24)
    hidden, past = inputs_of(blocks, 6, 3, 5)
    lengths = [1, 2, 3]
    for wrong in (hidden.double(), hidden[:, :8], hidden[:5], hidden.to("meta"), hidden.T.contiguous().T):
        with pytest.raises(ValueError, match=r"hidden must be torch\.float32 \("):
            blocks.step(wrong, lengths, past)
    for wrong in (past.double(), past.to("meta"), past.transpose(4, 5), past[:1], past[:, :1]):
        with pytest.raises(ValueError, match=r"past must be float32 \(2, 2, 3, 2, ., 8\) on CPU"):
            blocks.step(hidden, lengths, wrong)
    with pytest.raises(ValueError, match="with contiguous rows"):
        blocks.step(hidden, lengths, past.repeat_interleave(2, -1)[..., ::2])
    for wrong in ([1, 5], [0, 3, 3], [-1, 4, 3]):
        with pytest.raises(ValueError, match="lengths must be positive, got"):
            blocks.step(hidden, wrong, past)
    with pytest.raises(ValueError, match="one number for each of the 3 texts in past"):
        blocks.step(hidden, lengths, past, first_key=[0, 1])
    for wrong in ([5, 6], [-1]):
        with pytest.raises(ValueError, match="eot_after must be from 0 to 5"):
            blocks.step(hidden, lengths, past, eot_after=wrong)
    with pytest.raises(ValueError, match="no gradient"):
        blocks.step(hidden.requires_grad_(), lengths, past)


@pytest.mark.parametrize("make_layer", LAYERS)
def test_other_weights_are_refused(make_layer):
    good = blocks_of(make_layer, 2, 8, 24).blocks[0]
    TextBlocks([good], 2, False)
    layers = ("attention_in", "attention_out", "mlp_in", "mlp_out")
    for name in layers:
        layer = getattr(good, name)
        for field, tensor in layer._asdict().items():
            for wrong in (tensor.double(), tensor[1:], tensor.to("meta")):
                if (name, field, wrong.dtype, wrong.device.type) == ("mlp_in", "weight", tensor.dtype, "cpu"):
                    continue  # of another width inside the MLP, which the other layers do not fit
                with pytest.raises(ValueError, match=" must be torch"):
                    TextBlocks([good, good._replace(**{name: layer._replace(**{field: wrong})})], 2, False)
    with pytest.raises(ValueError, match=r"weight must be torch\.\w+ \(16, 16\)"):  # one layer in two places
        TextBlocks([good._replace(attention_out=good.mlp_out)], 2, False)
    with pytest.raises(ValueError, match="weight and bias of a norm must be"):
        TextBlocks([good._replace(mlp_norm=torch.nn.LayerNorm(15))], 2, False)
    with pytest.raises(ValueError, match="the width 16 is not a multiple of 3 heads"):
        TextBlocks([good], 3, False)
