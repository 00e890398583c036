"""Gradients of the image biases: sums of the partial sums that the tiles of `_query_kernel` wrote, in one launch."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .compiled import launch
from .primitives import kernel
from .tiles import block_d

# Numbers that a program loads at once.
NUMBERS = 4096


class Biases(NamedTuple):
    """A tensor for each bias; None if nobody asks for its gradient."""

    image_k_bias: Tensor | None
    image_v_bias: Tensor | None
    image_logit_bias: Tensor | None


@triton.jit
def _sum_rows(
    rows,
    n_rows,
    stride,
    i_part,
    batch,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The sum of rows of W numbers, of those that belong to part i_part of a group's heads."""
    o_w = tl.arange(0, BLOCK_W)
    b_sum = tl.zeros([BLOCK_W], tl.float32)
    for r in range(0, n_rows, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        m_r = (o_r < n_rows) & (o_r // batch % PARTS == i_part)
        p_row = rows + o_r.to(tl.int64)[:, None] * stride + o_w[None, :]
        b_sum += tl.sum(tl.load(p_row, mask=m_r[:, None] & (o_w < W)[None, :], other=0.0), 0)
    return b_sum


@kernel
def _bias_kernel(
    partial,  # Biases, (tiles, B, Hkv, D or BLOCK_H) float32
    gradients,  # Biases, (Hkv, D) or (Hq,)
    Hkv,
    n_rows,  # tiles * B
    batch,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i_h = tl.program_id(0)
    i_bias = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    # nested: the compiler leaves out what the first condition excludes, and the program decides the second
    if partial.image_k_bias is not None:  # noqa: SIM102
        if i_bias == 0:
            b_k = _sum_rows(partial.image_k_bias + i_h * D, n_rows, Hkv * D, 0, batch, D, 1, BLOCK_D, BLOCK_R)
            p_k = gradients.image_k_bias + i_h * D + o_d
            tl.store(p_k, b_k.to(gradients.image_k_bias.dtype.element_ty), mask=o_d < D)
    if partial.image_v_bias is not None:  # noqa: SIM102
        if i_bias == 1:
            b_v = _sum_rows(partial.image_v_bias + i_h * D, n_rows, Hkv * D, 0, batch, D, 1, BLOCK_D, BLOCK_R)
            p_v = gradients.image_v_bias + i_h * D + o_d
            tl.store(p_v, b_v.to(gradients.image_v_bias.dtype.element_ty), mask=o_d < D)
    if partial.image_logit_bias is not None:  # noqa: SIM102
        if i_bias == 2:
            rows = partial.image_logit_bias + i_h * BLOCK_H
            for i_part in tl.static_range(0, PARTS):
                b_logit = _sum_rows(rows, n_rows, Hkv * BLOCK_H, i_part, batch, BLOCK_H, PARTS, BLOCK_H, BLOCK_R)
                o_g = i_part * BLOCK_H + tl.arange(0, BLOCK_H)  # a group is padded to a power of two
                tl.store(gradients.image_logit_bias + i_h * G + o_g, b_logit, mask=o_g < G)


def bias_gradients(partial: Biases, gradients: Biases, kv_heads: int, head_dim: int, group: int, block_h: int) -> None:
    """Writes the gradients that are not None: sums of `partial` over the tiles and the batch.

    Args:
        block_h: heads of a group in a tile of `_query_kernel`. Consecutive tiles hold consecutive parts of a group.
    """
    given = next((x for x in partial if x is not None), None)
    if given is None:
        return
    tiles, batch = given.shape[:2]
    constants = _constants(head_dim, group, block_h)
    launch(_bias_kernel, (kv_heads, 3, 1), (partial, gradients, kv_heads, tiles * batch, batch), constants)


@cache
def _constants(head_dim: int, group: int, block_h: int) -> dict[str, Any]:
    return {
        "D": head_dim,
        "G": group,
        "BLOCK_H": block_h,
        "PARTS": triton.next_power_of_2(group) // block_h,
        "BLOCK_D": block_d(head_dim),
        "BLOCK_R": NUMBERS // block_d(head_dim),
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
