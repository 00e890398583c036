"""visual_fusion_attn on long text, as in a large decoder with grouped-query attention, and in decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.peers.attention import (
    CUDA_TEXT_ONLY,
    flash_implementation,
    flash_merge,
    flash_merge_compiled,
    text_only,
)
from benchmarks.sizes import sized
from benchmarks.valm_kernels import roofline
from benchmarks.valm_kernels.bench_visual_fusion import (
    COMPILED_MERGE,
    DIRECTIONS,
    MERGE,
    TOLERANCE,
    Case,
    Tensors,
    as_float32,
    call_of,
    close_to,
    skip_cuda_peer,
)
from valm_kernels import visual_fusion_attn


@dataclass(frozen=True)
class Grouped:
    batch: int
    heads: int
    kv_heads: int
    length: int
    images: int
    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        heads = f"H{self.heads}/{self.kv_heads}"
        shape = f"B{self.batch} {heads} T{self.length} K{self.images} D{self.head_dim}"
        return f"{shape} {str(self.dtype).removeprefix('torch.')}"

    def arithmetic(self, name: str, *, backward: bool) -> float:
        images = 0 if name in TEXT_ALONE else self.images
        sizes = (self.batch, self.heads, self.length, self.length, images, self.head_dim)
        return roofline.attention_s(roofline.Shape("", *sizes, G=self.heads // self.kv_heads), backward)

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """q, k, v, image_k and image_v, with tokens before heads in memory, and the gradient of the result."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=self.dtype)

        text = (self.batch, self.length)
        q, grad_out = (normal(*text, self.heads, self.head_dim).transpose(1, 2) for _ in range(2))
        k, v = (normal(*text, self.kv_heads, self.head_dim).transpose(1, 2) for _ in range(2))
        image_k, image_v = (
            normal(*text, self.images, self.kv_heads, self.head_dim).permute(0, 3, 1, 2, 4) for _ in range(2)
        )
        return *(x.requires_grad_() for x in (q, k, v, image_k, image_v)), grad_out


TEXT_ONLY = "text-only flash attention"
# These replace PyTorch's flash attention.
TEXT_ONLY_FA4 = "text-only FlashAttention-4"
IMPLEMENTATIONS = {"ours with FlashAttention-3": "FA3", "ours with FlashAttention-4": "FA4", TEXT_ONLY_FA4: "FA4"}
TEXT_ALONE = {TEXT_ONLY: text_only, **CUDA_TEXT_ONLY, TEXT_ONLY_FA4: text_only}
ONE_KERNEL = "ours, text in Triton too"
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "ours": visual_fusion_attn,
    ONE_KERNEL: lambda *inputs: visual_fusion_attn(*inputs, impl="triton"),
    **dict.fromkeys(IMPLEMENTATIONS, partial(visual_fusion_attn, impl="flash+triton")),
    **TEXT_ALONE,
    MERGE: flash_merge,
    COMPILED_MERGE: flash_merge_compiled,
}
SIZES = {
    "cuda": Grouped(8, 32, 8, 4096, 4, 128, torch.bfloat16),
    "cpu": sized(Grouped(1, 8, 2, 2048, 4, 64, torch.float32), Grouped(1, 4, 2, 16, 2, 16, torch.float32)),
}


@pytest.fixture
def flash(device, name):
    """Replaces PyTorch's flash attention while the benchmark runs."""
    with flash_implementation(IMPLEMENTATIONS.get(name) if device.type == "cuda" else None):
        yield


@DIRECTIONS
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("flash")
def bench_grouped(measure, device, name, backward):
    if (name == ONE_KERNEL or name in IMPLEMENTATIONS) and device.type == "cpu":
        pytest.skip(f"{name} is for CUDA")
    case = SIZES[device.type]
    *inputs, grad_out = case.tensors(device)
    leaves = inputs[:3] if name in TEXT_ALONE else inputs
    function = FUNCTIONS[name]
    skip_cuda_peer(name, function, tuple(leaves))
    given = (*leaves, grad_out) if backward else tuple(leaves)

    # the whole batch in float32 would need tens of gigabytes of scores; each row is independent
    first = as_float32(tuple(x[:1] for x in given))
    reference = text_only if name in TEXT_ALONE else lambda *x: visual_fusion_attn(*x, impl="reference")
    is_close = close_to(call_of(reference, backward)(*first), TOLERANCE[case.dtype])
    measure(
        group=f"{'forward + backward' if backward else 'forward'} {case}",
        name=name,
        function=call_of(function, backward),
        inputs=given,
        check=lambda found: is_close(tuple(x[:1] for x in found)),
        arithmetic=case.arithmetic(name, backward=backward),
    )


DECODING = sized(Case(1, 12, 1, 8, 64, torch.bfloat16, unique=1, prefix=8191), Case(1, 2, 1, 3, 16, prefix=9))


@pytest.mark.parametrize("name", ["ours", TEXT_ONLY])
def bench_decode(measure, device, name):
    t = Tensors(DECODING, device)
    text = (t.q, t.k, t.v)
    functions = {
        "ours": (visual_fusion_attn, (*text, *t.dense)),
        TEXT_ONLY: (lambda *inputs: text_only(*inputs, causal=False), text),
    }
    function, inputs = functions[name]
    images = (None, None) if name == TEXT_ONLY else ()
    reference = call_of(lambda *x: visual_fusion_attn(*x, *images, impl="reference"), False)
    (shape,) = (shape for shape in roofline.SHAPES if shape.Tq == 1)
    measure(
        group=f"decode {DECODING}",
        name=name,
        function=call_of(function, False),
        inputs=inputs,
        check=close_to(reference(*as_float32(inputs)), TOLERANCE[DECODING.dtype]),
        rounds=200,
        arithmetic=roofline.attention_s(replace(shape, K=0) if name == TEXT_ONLY else shape, backward=False),
    )
