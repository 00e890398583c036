"""visual_fusion_attn beside text-only flash attention (the floor) and what one would write without it.

Rows of one group share their inputs; the first row is ours, and the last column is each row's time over ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

import pytest
import torch
from torch import Tensor

from benchmarks.peers.attention import (
    CUDA_TEXT_ONLY,
    eager_concat,
    eager_softcap,
    flash_merge,
    flash_merge_compiled,
    flex_diagonal,
    text_only,
)
from benchmarks.valm_kernels import roofline
from valm_kernels import visual_fusion_attn


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    length: int
    images: int
    head_dim: int
    dtype: torch.dtype
    unique: float = 0.3  # pool rows per image slot
    prefix: int = 0

    def __str__(self) -> str:
        prefix = f" prefix {self.prefix}" if self.prefix else ""
        shape = f"B{self.batch} H{self.heads} T{self.length}{prefix} K{self.images} D{self.head_dim}"
        return f"{shape} {str(self.dtype).removeprefix('torch.')}"

    @property
    def flop(self) -> int:
        """Of the forward: q k^T and a v over the visible half of the text, and the same over the images."""
        keys = self.prefix + self.length / 2 + self.images
        return int(4 * self.batch * self.heads * self.length * keys * self.head_dim)

    @property
    def image_bytes(self) -> int:
        """Image keys and values of the dense layout."""
        elements = 2 * self.batch * self.heads * self.length * self.images * self.head_dim
        return elements * self.dtype.itemsize


class Tensors:
    """The inputs of a case, as projections leave them in memory: tokens before heads."""

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

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """The pool's rows laid out per token: (B, H, T, K, D) in memory (B, T, K, H, D)."""
        return tuple(
            pool.detach().transpose(0, 1)[self.image_index].permute(0, 3, 1, 2, 4).requires_grad_()
            for pool in (self.pool_k, self.pool_v)
        )

    @cached_property
    def expected(self) -> Tensor:
        with torch.no_grad():
            return eager_concat(*(t.float() for t in (self.q, self.k, self.v, *self.dense)))

    @cached_property
    def expected_gradients(self) -> tuple[Tensor, ...]:
        """Those of q, k, v and the dense images."""
        leaves = [t.detach().float().requires_grad_() for t in (self.q, self.k, self.v, *self.dense)]
        return torch.autograd.grad(eager_concat(*leaves), leaves, self.grad_out.float())

    @cached_property
    def expected_pooled_gradients(self) -> tuple[Tensor, ...]:
        """Those of q, k, v and the pool: a pool row's is the sum over the slots that hold it."""
        *text, image_k, image_v = self.expected_gradients
        rows, heads = self.image_index.flatten(), self.q.shape[1]
        pools = []
        for gradient in (image_k, image_v):  # (B, H, T, K, D)
            slots = gradient.permute(0, 2, 3, 1, 4).reshape(len(rows), heads, -1)
            pool = slots.new_zeros(self.pool_k.shape[1], *slots.shape[1:]).index_add_(0, rows, slots)
            pools.append(pool.transpose(0, 1))
        return *text, *pools


def arithmetic(case: Case, name: str, *, backward: bool) -> float | None:
    """The least seconds of an implementation's kernels on an H100, by roofline.py; its numbers are of 16 bits."""
    if case.dtype == torch.float32:
        return None
    images = 0 if name == "ours, no images" or name.startswith("text-only") else case.images
    pool = int(case.unique * case.batch * case.length * case.images) if name == "ours, pooled" else 0
    keys = case.length + case.prefix
    shape = roofline.Shape("", case.batch, case.heads, case.length, keys, images, case.head_dim, pool)
    return roofline.attention_s(shape, backward)


@cache
def tensors(case: Case, device: torch.device) -> Tensors:
    return Tensors(case, device)


def attention(name: str, t: Tensors) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """(function, its differentiable inputs) of one implementation."""
    text = (t.q, t.k, t.v)
    dense = (*text, *t.dense)
    functions = {
        "ours": (visual_fusion_attn, dense),
        "ours, pooled": (
            lambda *inputs: visual_fusion_attn(*inputs, image_index=t.image_index),
            (*text, t.pool_k, t.pool_v),
        ),
        "ours, no images": (lambda *inputs: visual_fusion_attn(*inputs, None, None), text),
        "text-only flash attention": (text_only, text),
        **{peer: (function, text) for peer, function in CUDA_TEXT_ONLY.items()},
        MERGE: (flash_merge, dense),
        COMPILED_MERGE: (flash_merge_compiled, dense),
        "eager concat": (eager_concat, dense),
        # on CPU it refuses inputs that require a gradient
        FLEX: (lambda *inputs: flex_diagonal(*(x.detach() if x.device.type == "cpu" else x for x in inputs)), dense),
    }
    return functions[name]


def forward(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Without gradients."""

    def call(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return call


def forward_backward(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of the inputs, which the gradient of the result follows."""

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        *leaves, grad_out = inputs
        return torch.autograd.grad(function(*leaves), leaves, grad_out)

    return call


def forward_call(name: str, case: Case, device: torch.device) -> Callable[[], object]:
    function, inputs = attention(name, tensors(case, device))
    return partial(forward(function), *inputs)


def forward_backward_call(name: str, case: Case, device: torch.device) -> Callable[[], object]:
    t = tensors(case, device)
    function, inputs = attention(name, t)
    return partial(forward_backward(function), *inputs, t.grad_out)


def inputs_note(inputs: tuple[Tensor, ...]) -> str:
    return f"inputs {sum(x.nbytes for x in inputs) / 1e6:.0f} MB"


MERGE, COMPILED_MERGE = "flash + LSE merge", "flash + LSE merge, compiled"
FLEX = "FlexAttention, diagonal mask"
# Largest error over largest value: a benchmark's check is for wrong results, the tests hold the last bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def close_to(expected: Tensor | tuple[Tensor, ...], tolerance: float):
    def check(result: Tensor | tuple[Tensor, ...]) -> None:
        pairs = [(result, expected)] if isinstance(result, Tensor) else list(zip(result, expected, strict=True))
        # a gradient that is zero but for rounding (of the key's bias: it shifts all scores) has no size of its own
        least = 1e-3 * max(truth.float().abs().max() for _, truth in pairs)
        for found, truth in pairs:
            size = torch.maximum(truth.float().abs().max(), least)
            error = (found.detach().float() - truth.float()).abs().max() / size
            assert error < tolerance, f"relative error {error:.1e}"

    return check


LARGE = Case(4, 12, 1024, 8, 64, torch.float32)
SMALL = Case(1, 12, 512, 4, 64, torch.float32)
CASES = [LARGE, replace(LARGE, dtype=torch.bfloat16), SMALL, replace(SMALL, dtype=torch.bfloat16)]
IMPLEMENTATIONS = [
    "ours",
    "ours, pooled",
    "ours, no images",
    "text-only flash attention",
    *CUDA_TEXT_ONLY,
    MERGE,
    COMPILED_MERGE,
    "eager concat",
    FLEX,
]


def skip_where_it_does_not_run(
    name: str, case: Case, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], backward: bool
) -> None:
    on_cuda = inputs[0].device.type == "cuda"
    if name in CUDA_TEXT_ONLY or name == COMPILED_MERGE:
        skip_cuda_peer(name, function, inputs)
    if name == MERGE and on_cuda and case.dtype == torch.float32:
        pytest.skip("PyTorch's flash attention on CUDA takes 16-bit numbers only")
    if name == FLEX and not on_cuda and (backward or case != SMALL):
        pytest.skip("FlexAttention on CPU has no backward, and takes seconds on all but one small shape")


def skip_cuda_peer(name: str, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Skips a peer that is for CUDA in 16 bits, and may not be there or not take these inputs."""
    if inputs[0].device.type != "cuda" or inputs[0].dtype == torch.float32:
        pytest.skip(f"{name} is measured on CUDA in 16 bits only")
    try:
        function(*inputs)
    except RuntimeError as error:
        pytest.skip(f"{name} does not take this: {str(error).splitlines()[0]}")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_forward(measure, device, case, name):
    t = tensors(case, device)
    function, inputs = attention(name, t)
    skip_where_it_does_not_run(name, case, function, inputs, backward=False)
    text_alone = len(inputs) == 3
    with torch.no_grad():
        expected = text_only(*(x.float() for x in inputs)) if text_alone else t.expected
    measure(
        group=f"forward {case}",
        name=name,
        function=forward(function),
        inputs=inputs,
        check=close_to(expected, TOLERANCE[case.dtype]),
        flop=case.flop,
        bytes_moved=None if text_alone else case.image_bytes,
        note=inputs_note(inputs),
        fresh=(forward_call, name, case, device) if case == LARGE else None,
        arithmetic=arithmetic(case, name, backward=False),
    )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_forward_backward(measure, device, case, name):
    t = tensors(case, device)
    function, inputs = attention(name, t)
    skip_where_it_does_not_run(name, case, function, inputs, backward=True)
    text_alone = len(inputs) == 3
    if text_alone:
        leaves = [x.detach().float().requires_grad_() for x in inputs]
        expected = torch.autograd.grad(text_only(*leaves), leaves, t.grad_out.float())
    else:
        expected = t.expected_pooled_gradients if name == "ours, pooled" else t.expected_gradients
    measure(
        group=f"forward + backward {case}",
        name=name,
        function=forward_backward(function),
        inputs=(*inputs, t.grad_out),
        check=close_to(expected, TOLERANCE[case.dtype]),
        flop=int(3.5 * case.flop),
        bytes_moved=None if text_alone else 3 * case.image_bytes,
        note=inputs_note(inputs),
        fresh=(forward_backward_call, name, case, device) if case == LARGE else None,
        arithmetic=arithmetic(case, name, backward=True),
    )


SOFTCAP = 50.0  # Gemma 2


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
@pytest.mark.parametrize("name", ["ours", "eager concat"])
def bench_softcap_and_image_q(measure, device, name, backward):
    """Capped scores, and a query of its own for the images, as augmented Gemma 2 layers have them."""
    case = replace(LARGE, batch=1, images=4)
    t = tensors(case, device)
    image_q = t.grad_out.flip(2).requires_grad_()
    inputs = (t.q, t.k, t.v, *t.dense, image_q)
    functions = {
        "ours": lambda *x: visual_fusion_attn(*x[:5], image_q=x[5], softcap=SOFTCAP),
        "eager concat": lambda *x: eager_softcap(*x, SOFTCAP),
    }

    def call(function: Callable[..., Tensor]) -> Tensor | tuple[Tensor, ...]:
        if backward:
            return torch.autograd.grad(function(*inputs), inputs, t.grad_out)
        with torch.no_grad():
            return function(*inputs)

    measure(
        group=f"softcap and image_q, {'forward + backward' if backward else 'forward'} {case}",
        name=name,
        function=lambda: call(functions[name]),
        check=close_to(call(functions["eager concat"]), TOLERANCE[case.dtype]),
        flop=int((3.5 if backward else 1) * case.flop),
        bytes_moved=(3 if backward else 1) * case.image_bytes,
    )


@pytest.mark.parametrize("name", ["ours", "one document", "a mask per document, eager"])
def bench_packed_documents(measure, device, name):
    """Eight documents of 128 tokens in one sequence, by first_key."""
    case = replace(LARGE, batch=1, images=4)
    t = tensors(case, device)
    first_key = (torch.arange(case.length) // 128 * 128).int().expand(case.batch, -1).to(device)
    functions = {
        "ours": lambda: visual_fusion_attn(t.q, t.k, t.v, *t.dense, first_key=first_key),
        "one document": lambda: visual_fusion_attn(t.q, t.k, t.v, *t.dense),
        "a mask per document, eager": lambda: visual_fusion_attn(
            t.q, t.k, t.v, *t.dense, first_key=first_key, impl="reference"
        ),
    }
    with torch.no_grad():
        if name == "one document":
            expected = visual_fusion_attn(t.q, t.k, t.v, *t.dense, impl="reference")
        else:
            expected = functions["a mask per document, eager"]()
        measure(
            group=f"8 packed documents, forward {case}",
            name=name,
            function=functions[name],
            check=close_to(expected, TOLERANCE[case.dtype]),
            # the FLOP that each has to do: a document's keys are an eighth of all
            flop=case.flop if name == "one document" else replace(case, batch=8, length=case.length // 8).flop,
            bytes_moved=case.image_bytes,
        )


@pytest.mark.parametrize("name", ["ours", "text-only flash attention"])
def bench_decode(measure, device, name):
    case = Case(1, 12, 1, 4, 64, torch.float32, unique=1, prefix=4095)
    t = tensors(case, device)
    functions = {
        "ours": lambda: visual_fusion_attn(t.q, t.k, t.v, *t.dense),
        "text-only flash attention": lambda: torch.nn.functional.scaled_dot_product_attention(t.q, t.k, t.v),
    }
    with torch.no_grad():
        images = t.dense if name == "ours" else (None, None)
        expected = visual_fusion_attn(t.q, t.k, t.v, *images, impl="reference")
        measure(
            group=f"decode {case}",
            name=name,
            function=functions[name],
            check=close_to(expected, TOLERANCE[case.dtype]),
            bytes_moved=2 * case.heads * (case.prefix + 1) * case.head_dim * 4,
            rounds=200,
        )


class FusionLayer(torch.nn.Module):
    """LN_img, the shared key and value projections of text and images, and the operation."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.image_norm = torch.nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (torch.nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def image_side(self, q: Tensor, k: Tensor, v: Tensor, images: Tensor, image_index: Tensor | None) -> Tensor:
        """q, k, v (B, H, T, D); images (B, T, K, C), or (U, C) with image_index (B, T, K)."""
        images = self.image_norm(images)
        image_k, image_v = self.split(self.key(images)), self.split(self.value(images))
        if image_index is None:
            image_k, image_v = (x.permute(0, 3, 1, 2, 4) for x in (image_k, image_v))
        else:
            image_k, image_v = (x.transpose(0, 1) for x in (image_k, image_v))
        return visual_fusion_attn(q, k, v, image_k, image_v, image_index=image_index)

    def forward(self, states: Tensor, images: Tensor, image_index: Tensor | None) -> Tensor:
        q, k, v = (self.split(layer(states)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        out = self.image_side(q, k, v, images, image_index)
        return self.output(out.transpose(1, 2).flatten(2))


def fusion_layer_call(part: str, unique: float, layout: str, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of the layer, or of its image side, on retrieved images of which a share is unique."""
    t = tensors(replace(LAYER, unique=unique), device)
    generator = torch.Generator().manual_seed(0)
    width = LAYER.heads * LAYER.head_dim
    torch.manual_seed(0)
    layer = FusionLayer(LAYER.heads, LAYER.head_dim).to(device)
    states = torch.randn(LAYER.batch, LAYER.length, width, generator=generator).to(device)
    pool = torch.randn(t.pool_k.shape[1], width, generator=generator).to(device)
    images = (pool, t.image_index) if layout == "pooled" else (pool[t.image_index], None)
    parameters = [p for module in (layer.image_norm, layer.key, layer.value) for p in module.parameters()]

    def image_side() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer.image_side(t.q, t.k, t.v, *images), (*parameters, t.q, t.k, t.v), t.grad_out)

    def whole_layer() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(states, *images).square().sum(), list(layer.parameters()))

    return {"image side": image_side, "whole layer": whole_layer}[part]


LAYER = Case(1, 12, 1024, 8, 64, torch.float32)


@pytest.mark.parametrize("layout", ["pooled", "dense"])
@pytest.mark.parametrize("unique", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("part", ["image side", "whole layer"])
def bench_fusion_layer(measure, device, part, unique, layout):
    """Every retrieved image projected where it stands, against each unique image once."""
    call = fusion_layer_call(part, unique, layout, device)
    # keys and values of all images, float32
    projected = 2 * LAYER.batch * LAYER.length * LAYER.images * LAYER.heads * LAYER.head_dim * 4
    dense = fusion_layer_call(part, unique, "dense", device)()
    measure(
        group=f"{part}, forward + backward, {unique:.0%} unique images {LAYER}",
        name=layout,
        function=call,
        # float32 sums over 8,192 images, in two orders
        check=close_to(dense, 1e-3),
        note=f"{projected * (unique if layout == 'pooled' else 1) / 1e6:.0f} MB of projected images",
        fresh=(fusion_layer_call, part, unique, layout, device) if part == "whole layer" else None,
    )
