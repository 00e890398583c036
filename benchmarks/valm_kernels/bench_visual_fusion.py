"""visual_fusion_attn compared with text-only flash attention (the lower bound) and with its alternatives.

Rows of one group share their inputs; the first row is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.peers.attention import (
    CUDA_TEXT_ONLY,
    eager_concat,
    flash_merge,
    flash_merge_compiled,
    flex_diagonal,
    gather_attn,
    text_only,
)
from benchmarks.sizes import sized
from benchmarks.valm_kernels import roofline
from valm_kernels import visual_fusion_attn

Attention = Callable[..., Tensor]
DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    length: int
    images: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    unique: float = 0.3  # rows of the pool per image slot
    prefix: int = 0

    def __str__(self) -> str:
        prefix = f" prefix {self.prefix}" if self.prefix else ""
        shape = f"B{self.batch} H{self.heads} T{self.length}{prefix} K{self.images} D{self.head_dim}"
        return f"{shape} {str(self.dtype).removeprefix('torch.')}"


class Tensors:
    """The inputs of a case, in the memory order of projections: tokens before heads."""

    def __init__(self, case: Case, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        batch, heads, length, head_dim = case.batch, case.heads, case.length, case.head_dim

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, case.dtype)

        self.q, self.grad_out = (normal(batch, length, heads, head_dim).transpose(1, 2) for _ in range(2))
        keys = length + case.prefix
        self.k, self.v = (normal(batch, keys, heads, head_dim).transpose(1, 2) for _ in range(2))
        rows = max(1, int(case.unique * batch * length * case.images))
        self.pool_k, self.pool_v = (normal(rows, heads, head_dim).transpose(0, 1) for _ in range(2))
        self.image_index = torch.randint(0, rows, (batch, length, case.images), generator=generator).to(device)
        for tensor in (self.q, self.k, self.v, self.pool_k, self.pool_v):
            tensor.requires_grad_()

    def laid_out(self, pool: Tensor) -> Tensor:
        """The pool's rows, gathered for each token: (B, H, T, K, D), in memory (B, T, K, H, D)."""
        return pool.transpose(0, 1)[self.image_index].permute(0, 3, 1, 2, 4)

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        return tuple(self.laid_out(pool.detach()).requires_grad_() for pool in (self.pool_k, self.pool_v))


def arithmetic(case: Case, name: str, *, backward: bool) -> float | None:
    """The least seconds of an implementation's kernels on an H100 in 16 bits (roofline.py)."""
    if case.dtype == torch.float32:
        return None
    images = 0 if name == "ours, no images" or name.startswith("text-only") else case.images
    pool = int(case.unique * case.batch * case.length * case.images) if name == "ours, pooled" else 0
    keys = case.length + case.prefix
    shape = roofline.Shape("", case.batch, case.heads, case.length, keys, images, case.head_dim, pool)
    return roofline.attention_s(shape, backward)


tensors = cache(Tensors)

MERGE, COMPILED_MERGE = "flash + LSE merge", "flash + LSE merge, compiled"
FLEX = "FlexAttention, diagonal mask"
TEXT_ONLY: dict[str, Attention] = {"text-only flash attention": text_only, **CUDA_TEXT_ONLY}
DENSE: dict[str, Attention] = {
    MERGE: flash_merge,
    COMPILED_MERGE: flash_merge_compiled,
    "eager concat": eager_concat,
    # on CPU it rejects inputs that require a gradient
    FLEX: lambda *inputs: flex_diagonal(*(x.detach() if x.device.type == "cpu" else x for x in inputs)),
}


def attention(name: str, t: Tensors) -> tuple[Attention, Attention, tuple[Tensor, ...]]:
    """One implementation, its eager reference, and the differentiable inputs of both."""
    text = (t.q, t.k, t.v)
    if name == "ours, pooled":
        return (
            lambda *inputs: visual_fusion_attn(*inputs, image_index=t.image_index),
            lambda q, k, v, *pools: eager_concat(q, k, v, *map(t.laid_out, pools)),
            (*text, t.pool_k, t.pool_v),
        )
    if name == "ours, no images":
        return lambda *inputs: visual_fusion_attn(*inputs, None, None), text_only, text
    if name in TEXT_ONLY:
        return TEXT_ONLY[name], text_only, text
    return DENSE.get(name, visual_fusion_attn), eager_concat, (*text, *t.dense)


def call_of(function: Attention, backward: bool) -> Callable[..., tuple[Tensor, ...]]:
    """A call without gradients, or with the gradients of its inputs; then the last input is the gradient of the
    result."""

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        if backward:
            *leaves, grad_out = inputs
            return torch.autograd.grad(function(*leaves), leaves, grad_out)
        with torch.no_grad():
            return (function(*inputs),)

    return call


# Largest error ÷ largest value. A benchmark only checks for wrong results; the tests check the last bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def close_to(expected: tuple[Tensor, ...], tolerance: float) -> Callable[[tuple[Tensor, ...]], None]:
    def check(results: tuple[Tensor, ...]) -> None:
        # the key bias shifts all scores, so its gradient is only rounding and has no scale of its own
        least = 1e-3 * max(truth.float().abs().max() for truth in expected)
        for found, truth in zip(results, expected, strict=True):
            size = torch.maximum(truth.float().abs().max(), least)
            error = (found.detach().float() - truth.float()).abs().max() / size
            assert error < tolerance, f"relative error {error:.1e}"

    return check


def as_float32(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().float().requires_grad_() for x in tensors)


LARGE = sized(Case(4, 12, 1024, 8, 64), Case(2, 2, 16, 3, 16))
# PyTorch 2.13's FlexAttention is wrong for 8 queries on a CPU that has AVX2 and no AVX-512.
SMALL = sized(Case(1, 12, 512, 4, 64), Case(1, 2, 16, 2, 16))
CASES = [LARGE, replace(LARGE, dtype=torch.bfloat16), SMALL]
IMPLEMENTATIONS = ["ours", "ours, pooled", "ours, no images", *TEXT_ONLY, *DENSE]


def skip_cuda_peer(name: str, function: Attention, inputs: tuple[Tensor, ...]) -> None:
    """Skips a peer for CUDA in 16 bits that is not installed or does not support these inputs."""
    if name not in CUDA_TEXT_ONLY and name != COMPILED_MERGE:
        return
    if inputs[0].device.type != "cuda" or inputs[0].dtype == torch.float32:
        pytest.skip(f"{name} is measured on CUDA in 16 bits only")
    try:
        function(*inputs)
    except RuntimeError as error:
        pytest.skip(f"{name} does not take this: {str(error).splitlines()[0]}")


@DIRECTIONS
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_attention(measure, device, case, name, backward):
    t = tensors(case, device)
    function, reference, inputs = attention(name, t)
    skip_cuda_peer(name, function, inputs)
    if name == MERGE and device.type == "cuda" and case.dtype == torch.float32:
        pytest.skip("PyTorch's flash attention on CUDA takes 16-bit numbers only")
    if name == FLEX and device.type == "cpu" and (backward or case != SMALL):
        pytest.skip("FlexAttention on CPU has no backward, and takes seconds on all but one small shape")
    if backward:
        inputs = (*inputs, t.grad_out)
    measure(
        group=f"{'forward + backward' if backward else 'forward'} {case}",
        name=name,
        function=call_of(function, backward),
        inputs=inputs,
        check=close_to(call_of(reference, backward)(*as_float32(inputs)), TOLERANCE[case.dtype]),
        note=f"inputs {sum(x.nbytes for x in inputs) / 1e6:.0f} MB",
        arithmetic=arithmetic(case, name, backward=backward),
    )


PREFILL = [replace(LARGE, batch=1, length=sized(length, 16), dtype=torch.bfloat16) for length in (1024, 4096)]


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("name", ["ours", "ours, pooled", "text-only flash attention", MERGE])
@pytest.mark.parametrize("case", PREFILL, ids=["short", "long"])
def bench_prefill(measure, device, case, name):
    """A prompt of one row, which has few tiles for the multiprocessors of a GPU."""
    bench_attention(measure, device, case, name, backward=False)


@pytest.mark.usefixtures("on_cuda")
@DIRECTIONS
@pytest.mark.parametrize("documents", ["first_key", "cu_seqlens", "one document a row"])
def bench_call_of_valm(measure, device, documents, backward):
    """The call of VaLM's fusion layer in training: a pool, its biases, lse, and eight documents a row as first_key."""
    case = replace(LARGE, dtype=torch.bfloat16)
    t, length = tensors(case, device), case.length // 8
    starts = torch.arange(0, case.batch * case.length + 1, length, dtype=torch.int32, device=device)
    limits = {
        "first_key": {"first_key": (starts[: case.length // length].repeat_interleave(length)).expand(case.batch, -1)},
        "cu_seqlens": {"cu_seqlens": starts, "max_seqlen": length},
    }.get(documents, {})

    def function(q, k, v, image_k, image_v, k_bias, v_bias, logit_bias, impl="auto"):
        biases = {"image_k_bias": k_bias, "image_v_bias": v_bias, "image_logit_bias": logit_bias}
        options = {"image_index": t.image_index, "return_lse": True, "impl": impl}
        return visual_fusion_attn(q, k, v, image_k, image_v, **biases, **limits, **options)[0]

    biases = torch.zeros(2, case.heads, case.head_dim, dtype=case.dtype, device=device)
    biases = (*biases, torch.zeros(case.heads, device=device))
    leaves = (t.q, t.k, t.v, t.pool_k, t.pool_v, *(bias.requires_grad_() for bias in biases))
    inputs = (*leaves, t.grad_out) if backward else leaves
    expected = call_of(partial(function, impl="reference"), backward)(*as_float32(inputs))
    # the gradients of the biases are sums over all tokens, of which much cancels
    is_close = close_to(expected[:5], TOLERANCE[case.dtype])
    measure(
        group=f"call of VaLM, {'forward + backward' if backward else 'forward'} {case}",
        name=documents,
        function=call_of(function, backward),
        inputs=inputs,
        check=lambda found: is_close(found[:5]),
    )


SOFTCAP = 50.0  # Gemma 2
ONE_ROW = replace(LARGE, batch=1, images=4)


@DIRECTIONS
@pytest.mark.parametrize("name", ["ours", "eager concat"])
def bench_softcap_and_image_q(measure, device, name, backward):
    """Capped scores and a separate query for the images, as in augmented Gemma 2 layers."""
    t = tensors(ONE_ROW, device)
    inputs = (t.q, t.k, t.v, *t.dense, t.grad_out.flip(2).requires_grad_())
    functions = {
        "ours": lambda *x: visual_fusion_attn(*x[:5], image_q=x[5], softcap=SOFTCAP),
        "eager concat": lambda *x: eager_concat(*x, SOFTCAP),
    }
    if backward:
        inputs = (*inputs, t.grad_out)
    measure(
        group=f"softcap and image_q, {'forward + backward' if backward else 'forward'} {ONE_ROW}",
        name=name,
        function=call_of(functions[name], backward),
        inputs=inputs,
        check=close_to(call_of(functions["eager concat"], backward)(*inputs), TOLERANCE[ONE_ROW.dtype]),
    )


@pytest.mark.parametrize("name", ["ours", "one document", "a mask per document, eager"])
def bench_packed_documents(measure, device, name):
    """Eight documents in one sequence, by first_key."""
    t = tensors(ONE_ROW, device)
    length = ONE_ROW.length // 8
    first_key = (torch.arange(ONE_ROW.length) // length * length).int()[None].to(device)
    options = {} if name == "one document" else {"first_key": first_key}
    impl = "reference" if name == "a mask per document, eager" else "auto"
    inputs = (t.q, t.k, t.v, *t.dense)
    expected = call_of(lambda *x: visual_fusion_attn(*x, **options, impl="reference"), False)(*inputs)
    measure(
        group=f"8 packed documents, forward {ONE_ROW}",
        name=name,
        function=call_of(lambda *x: visual_fusion_attn(*x, **options, impl=impl), False),
        inputs=inputs,
        check=close_to(expected, TOLERANCE[ONE_ROW.dtype]),
    )


@DIRECTIONS
@pytest.mark.parametrize("name", ["ours", "scaled_dot_product_attention, mask"])
@pytest.mark.parametrize("limit", ["window of 64", "8 documents", "2 queries a key head"])
def bench_limited_text(measure, device, limit, name, backward):
    """Attention to only the text, for which FlexAttention has no backward on a CPU."""
    t, position = tensors(ONE_ROW, device), torch.arange(ONE_ROW.length, device=device)
    length = ONE_ROW.length // 8
    first = {"window of 64": position - 63, "8 documents": position // length * length}.get(limit)
    options = {} if first is None else {"first_key": first.int()[None]}
    sees = position <= position[:, None]
    if first is not None:
        sees &= position >= first[:, None]
    heads = slice(None, None, 2 if first is None else 1)
    k, v = (x.detach()[:, heads].requires_grad_() for x in (t.k, t.v))
    inputs = (t.q, k, v, t.grad_out) if backward else (t.q, k, v)
    functions = {
        "ours": lambda *x: visual_fusion_attn(*x, None, None, **options),
        "reference": lambda *x: visual_fusion_attn(*x, None, None, **options, impl="reference"),
    }
    function = functions.get(name, partial(scaled_dot_product_attention, attn_mask=sees, enable_gqa=True))
    measure(
        group=f"text only, {limit}, {'forward + backward' if backward else 'forward'} {ONE_ROW}",
        name=name,
        function=call_of(function, backward),
        inputs=inputs,
        check=close_to(call_of(functions["reference"], backward)(*inputs), TOLERANCE[ONE_ROW.dtype]),
    )


@pytest.mark.usefixtures("on_cuda")
@DIRECTIONS
@pytest.mark.parametrize("name", ["ours, pooled", "attention-gym's gather_attn"])
def bench_keys_as_values(measure, device, name, backward):
    """Text and a pool whose keys are the values too: all that attention-gym's gather_attn takes."""
    case = replace(ONE_ROW, dtype=torch.bfloat16)
    t = tensors(case, device)
    peer = partial(gather_attn, impl="fused" if device.type == "cuda" else "reference")
    functions = {
        "ours, pooled": lambda q, text, pool: visual_fusion_attn(q, text, text, pool, pool, image_index=t.image_index),
        "attention-gym's gather_attn": lambda q, text, pool: peer(q, text, pool, t.image_index),
    }
    inputs = (t.q, t.k, t.pool_k, t.grad_out) if backward else (t.q, t.k, t.pool_k)

    def reference(q, text, pool):
        return eager_concat(q, text, text, *[t.laid_out(pool)] * 2)

    measure(
        group=f"keys are values, {'forward + backward' if backward else 'forward'} {case}",
        name=name,
        function=call_of(functions[name], backward),
        inputs=inputs,
        check=close_to(call_of(reference, backward)(*as_float32(inputs)), TOLERANCE[torch.bfloat16]),
    )


class FusionLayer(torch.nn.Module):
    """LN_img, the projections that text and images share, and the operation."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.image_norm = torch.nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (torch.nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def forward(self, states: Tensor, images: Tensor, image_index: Tensor | None) -> Tensor:
        """states (B, T, C); images (B, T, K, C), or (U, C) with image_index (B, T, K)."""
        q, k, v = (self.split(layer(states)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        images = self.image_norm(images)
        image_k, image_v = (
            x.permute(0, 3, 1, 2, 4) if image_index is None else x.transpose(0, 1)
            for x in (self.split(self.key(images)), self.split(self.value(images)))
        )
        out = visual_fusion_attn(q, k, v, image_k, image_v, image_index=image_index)
        return self.output(out.transpose(1, 2).flatten(2))


LAYER = sized(Case(1, 12, 1024, 8, 64), Case(1, 2, 8, 3, 16))


@pytest.mark.parametrize("layout", ["pooled", "dense"])
@pytest.mark.parametrize("unique", [0.3, 1.0])
def bench_fusion_layer(measure, device, unique, layout):
    """Projects every retrieved image for each token, compared with each unique image once."""
    index = tensors(replace(LAYER, unique=unique), device).image_index
    width = LAYER.heads * LAYER.head_dim
    torch.manual_seed(0)
    layer = FusionLayer(LAYER.heads, LAYER.head_dim).to(device)
    states = torch.randn(LAYER.batch, LAYER.length, width).to(device)
    pool = torch.randn(int(index.max()) + 1, width).to(device)

    def gradients(*images: Tensor | None) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(states, *images).square().sum(), list(layer.parameters()))

    images = {"pooled": (pool, index), "dense": (pool[index], None)}
    measure(
        group=f"whole layer, forward + backward, {unique:.0%} unique images {LAYER}",
        name=layout,
        function=lambda: gradients(*images[layout]),
        # float32 sums over 8,192 images, in two orders
        check=close_to(gradients(*images["dense"]), 1e-3),
        note=f"{2 * images[layout][0].nbytes / 1e6:.0f} MB of projected images",
    )
