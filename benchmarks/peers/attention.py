"""The alternatives to valm_kernels: causal attention in which every query has K extra keys of its own.

All take q, k, v (B, H, T, D) and image_k, image_v (B, H, T, K, D), causal, Tq = Tk, scale 1 / sqrt(D). Text-only
attention and flash_merge also take fewer heads of keys and values (grouped-query attention).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.peers.optional import optional_module

_aten = torch.ops.aten


def text_only(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """The lower bound: PyTorch's flash attention without images."""
    if q.device.type == "cuda" and q.dtype != torch.float32:  # whichever attention PyTorch would choose there
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]
    grouped = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def cudnn_text_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's attention without images; raises RuntimeError if cuDNN does not support it."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )


def flash3_text_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-3, a separate package, without images."""
    flash = optional_module("flash_attn_interface", "FlashAttention-3 (flash_attn_interface)")
    out = flash.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


# On CUDA, in 16 bits.
CUDA_TEXT_ONLY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "text-only cuDNN attention": cudnn_text_only,
    "text-only FlashAttention-3": flash3_text_only,
}


@contextmanager
def flash_implementation(name: str | None) -> Iterator[None]:
    """Replaces PyTorch's flash attention by FlashAttention-3 or -4 ("FA3", "FA4"); None changes nothing. Skips the
    benchmark if the package is not installed."""
    if name is None:
        yield
        return
    try:
        torch.nn.attention.activate_flash_attention_impl(name)
    except (AttributeError, ImportError, RuntimeError) as error:  # PyTorch before 2.11, no such package, another GPU
        pytest.skip(f"{name} cannot take the place of PyTorch's flash attention: {str(error).splitlines()[0]}")
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def eager_concat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    image_q: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The published way: concatenates all scores and takes one softmax. Scores may be capped, and images may have a
    separate query."""

    def scores(products: Tensor) -> Tensor:
        scaled = q.shape[-1] ** -0.5 * products
        return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)

    length = q.shape[2]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    text = scores(q @ k.mT).masked_fill(future, -torch.inf)  # (B, H, T, T)
    image = scores(image_k @ (q if image_q is None else image_q).unsqueeze(-1)).squeeze(-1)  # (B, H, T, K)
    weights = torch.cat([text, image], -1).softmax(-1)
    return weights[..., :length] @ v + (weights[..., None, length:] @ image_v).squeeze(-2)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, tuple]:
    """out, lse and what the backward needs, from PyTorch's causal flash attention on CPU or CUDA."""
    if q.device.type == "cpu":
        return *_aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale), ()
    out, lse, *state, _ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)
    return out, lse, tuple(state)


def _flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: tuple, scale: float
) -> tuple[Tensor, ...]:
    inputs = (grad_out, q, k, v, out, lse)
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, 0.0, True, scale=scale)
    *lengths, philox_seed, philox_offset = state
    return _aten._scaled_dot_product_flash_attention_backward(
        *inputs, *lengths, 0.0, True, philox_seed, philox_offset, scale=scale
    )


def join_images(
    q: Tensor, image_k: Tensor, image_v: Tensor, text_out: Tensor, text_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """out and lse of text and images, and the weights of the images."""
    heads = image_k.shape[1]
    image_scores = q.shape[-1] ** -0.5 * _ungrouped((image_k @ _grouped(q, heads).mT).mT).to(text_lse.dtype)
    lse = torch.logaddexp(text_lse, image_scores.logsumexp(-1))
    weights = (image_scores - lse.unsqueeze(-1)).exp().to(q.dtype)  # (B, H, T, K)
    image_out = _ungrouped(_grouped(weights, heads) @ image_v)
    return text_out * (text_lse - lse).exp().unsqueeze(-1).to(q.dtype) + image_out, lse, weights


def image_gradients(
    grad_out: Tensor, q: Tensor, image_k: Tensor, image_v: Tensor, weights: Tensor, out: Tensor, text_dq: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, whose text part is text_dq, image_k and image_v."""
    heads = image_k.shape[1]
    delta = (grad_out * out).sum(-1, keepdim=True)
    grad_weights = _ungrouped((image_v @ _grouped(grad_out, heads).mT).mT)  # (B, H, T, K)
    grad_scores = _grouped(weights * (grad_weights - delta) * q.shape[-1] ** -0.5, heads)
    grad_q = text_dq + _ungrouped(grad_scores @ image_k)
    return (
        grad_q,
        _outer(grad_scores, _grouped(q, heads)),
        _outer(_grouped(weights, heads), _grouped(grad_out, heads)),
    )


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


class _FlashMerge(torch.autograd.Function):
    """q (B, H, T, D); k, v (B, H / G, T, D); image_k, image_v (B, H / G', T, K, D). `compiled`: compile the joining."""

    @staticmethod
    def forward(ctx, q, k, v, image_k, image_v, compiled):
        text_out, text_lse, ctx.state = _flash(q, k, v, q.shape[-1] ** -0.5)
        join = _compiled(join_images) if compiled else join_images
        out, lse, weights = join(q, image_k, image_v, text_out, text_lse)
        ctx.save_for_backward(q, k, v, image_k, image_v, weights, out, lse)
        ctx.compiled = compiled
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, image_k, image_v, weights, out, lse = ctx.saved_tensors
        text_dq, grad_k, grad_v = _flash_backward(grad_out, q, k, v, out, lse, ctx.state, q.shape[-1] ** -0.5)
        of_images = _compiled(image_gradients) if ctx.compiled else image_gradients
        grad_q, grad_image_k, grad_image_v = of_images(grad_out, q, image_k, image_v, weights, out, text_dq)
        return grad_q, grad_k, grad_v, grad_image_k, grad_image_v, None


def _grouped(x: Tensor, heads: int) -> Tensor:
    """(B, heads G, T, X) as (B, heads, T, G, X)."""
    return x.unflatten(1, (heads, -1)).transpose(2, 3)


def _ungrouped(x: Tensor) -> Tensor:
    """The inverse of `_grouped`."""
    return x.transpose(2, 3).flatten(1, 2)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Sums of outer products (..., X, Y) over the rows of left (..., G, X) and right (..., G, Y)."""
    # for one row a matrix product is slower
    return left.mT * right if left.shape[-2] == 1 else left.mT @ right


def flash_merge(q: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor, compiled: bool = False) -> Tensor:
    """The strongest peer: stock flash attention, and the images in PyTorch operations, joined by log-sum-exp."""
    return _FlashMerge.apply(q, k, v, image_k, image_v, compiled)


# flash_merge through torch.compile, which fuses the images' operations into fewer kernels.
flash_merge_compiled = partial(flash_merge, compiled=True)


@cache
def _diagonal_mask(length: int, num_images: int, device: torch.device) -> BlockMask:
    def sees(batch, head, query, key):
        return torch.where(key < length, key <= query, (key - length) // num_images == query)

    return create_block_mask(sees, None, None, length, length * (1 + num_images), device=device)


def flex_diagonal(q: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor) -> Tensor:
    """FlexAttention over text and all images as one sequence of keys. On CPU it has no backward."""
    keys, values = (torch.cat([t, i.flatten(2, 3)], 2) for t, i in ((k, image_k), (v, image_v)))
    mask = _diagonal_mask(q.shape[2], image_k.shape[3], q.device)
    return _compiled(flex_attention)(q, keys, values, block_mask=mask)


def gather_attn(q: Tensor, text: Tensor, pool: Tensor, image_index: Tensor, impl: str = "fused") -> Tensor:
    """attention-gym's attention over text (B, H, T, D) and rows of a pool (H, U, D), whose keys are the values too. Its
    fused kernels need CUDA; impl="reference" is its eager code."""
    peer = optional_module("attn_gym.sparse.gather_attn", "attention-gym (attn-gym)")
    pools = pool.expand(q.shape[0], -1, -1, -1)
    return peer.gather_attn(q, text, pools, image_index, sliding_window_size=q.shape[2], impl=impl)
