"""Gradients of the image pool: a segmented reduction over the slots (b, t, k) of image_index that hold an image.

The maths is in backward.py. The slots are sorted by image. A program then owns one image, for as many heads as fit, and
sums dx u and b do over the image's slots in order, so results are bit for bit equal in every run.

A popular image, with very many slots, would make one program long. For B4 T1024 K8, an image in a tenth of the slots
takes 3,277 slots, or 820 steps one after the other, while other images take 1. So the sorted slots are also cut into
blocks of BLOCK_SLOTS, and separate programs sum the part of each block that belongs to a popular image. A popular image
takes more slots than a block, so a block contains parts of at most two popular images, one at its beginning and one at
its end. The program of the image then adds up these parts, again in order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Gradients, Inputs, num_images
from ..layout import empty_rows_like
from ..slots import sorted_slots
from .backward_query import QueryResults
from .compiled import launch
from .launch import VECTOR, cdiv, strides
from .primitives import columns, kernel, row_pointers
from .tiles import block_d

# Slots per step of a program, whose rows are loaded together; columns (heads x D) of its sums; columns of a thread, 16
# bytes of a row of 16-bit elements; and slots from which an image is popular. Chosen by arithmetic and by the compiled
# code, not yet measured on a GPU. A thread keeps its columns, so no sum crosses threads or waits for a barrier.
SLOTS = 4
COLUMNS = 1024
THREAD_COLUMNS = 8
BLOCK_SLOTS = 256


@triton.jit
def _sum_slots(
    image_q,
    grad_out,
    image_dx,  # (B, Hq, K, Tq)
    image_b,
    order,  # slots (b, t, k), flattened, sorted by image
    stride_iq,  # (batch, head, position)
    stride_do,
    o_h,
    begin,
    end,
    Hkv,
    Tq,
    K,
    D: tl.constexpr,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Sums of dx u and b do over the slots begin..end of `order`, for the key-value heads o_h, [BH, BD] each."""
    m_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    b_dk = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for i_g in range(0, G):
        o_hq = o_h * G + i_g
        # offsets of the heads; what follows adds the scalars of a slot to them
        o_c, o_u, o_do = o_hq * K * Tq, o_hq * stride_iq[1], o_hq * stride_do[1]
        for i_e in range(begin, end, SLOTS):
            for i in tl.static_range(0, SLOTS):
                has_slot = i_e + i < end
                # a division of int32 takes a fifth of the instructions of one of int64
                i_slot = tl.load(order + i_e + i, mask=has_slot, other=0).to(tl.int32)
                i_token = i_slot // K
                i_row = i_token // Tq
                i_b, i_t = i_row.to(tl.int64), (i_token - i_row * Tq).to(tl.int64)
                i_c = (i_b * Hkv * G * K + (i_slot - i_token * K)) * Tq + i_t
                # [BH]
                m_h = (o_h < Hkv) & has_slot
                b_dx = tl.load(image_dx + i_c + o_c, mask=m_h, other=0.0)
                b_b = tl.load(image_b + i_c + o_c, mask=m_h, other=0.0)
                # [BH, BD]
                m_hd = m_h[:, None] & m_d
                p_u = columns(row_pointers(image_q, stride_iq, i_b, 0, i_t) + o_u, BLOCK_D, ALIGNED)
                p_do = columns(row_pointers(grad_out, stride_do, i_b, 0, i_t) + o_do, BLOCK_D, ALIGNED)
                b_dk += b_dx[:, None] * tl.load(p_u, mask=m_hd, other=0.0).to(tl.float32)
                b_dv += b_b[:, None] * tl.load(p_do, mask=m_hd, other=0.0).to(tl.float32)
    return b_dk, b_dv


@triton.jit
def _of_heads(x, length, BY_HEAD: tl.constexpr):
    """Pointers to x for the program's heads: shared by all heads, or one x of `length` for each head."""
    if BY_HEAD:
        x += tl.program_id(1).to(tl.int64) * length
    return x


@kernel
def _popular_kernel(
    image_q,
    grad_out,
    image_dx,
    image_b,
    image_index,  # (B Tq K), or (Hkv, B Tq K), as order
    order,
    segment,  # (U + 1) or (Hkv, U + 1): where the slots of an image begin in `order`
    parts,  # (blocks, 2, 2, Hkv, D) float32: (image at the beginning or the end of a block, dk or dv)
    stride_iq,
    stride_do,
    Hkv,
    Tq,
    K,
    n_slots,
    pool_size,
    BY_HEAD: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    image_index = _of_heads(image_index, n_slots, BY_HEAD)
    order = _of_heads(order, n_slots, BY_HEAD)
    segment = _of_heads(segment, pool_size + 1, BY_HEAD)
    i_s = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.program_id(0) * BLOCK_SLOTS
    last = tl.minimum(first + BLOCK_SLOTS, n_slots) - 1
    i_first = tl.load(image_index + tl.load(order + first)).to(tl.int64)
    for i_end in tl.static_range(0, 2):
        i_u = i_first
        if i_end == 1:
            i_u = tl.load(image_index + tl.load(order + last)).to(tl.int64)
            # an image that fills the whole block counts as the image at its beginning
            i_u = tl.where(i_u == i_first, -1, i_u)
        begin = tl.load(segment + i_u, mask=i_u >= 0, other=0).to(tl.int32)
        end = tl.load(segment + i_u + 1, mask=i_u >= 0, other=0).to(tl.int32)
        if end - begin > BLOCK_SLOTS:
            b_dk, b_dv = _sum_slots(
                image_q,
                grad_out,
                image_dx,
                image_b,
                order,
                stride_iq,
                stride_do,
                o_h,
                tl.maximum(begin, first),
                tl.minimum(end, last + 1),
                Hkv,
                Tq,
                K,
                D,
                G,
                ALIGNED,
                BLOCK_D,
                BLOCK_H,
                SLOTS,
            )
            m_hd = (o_h < Hkv)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
            p_part = columns(parts + ((i_s * 2 + i_end) * 2 * Hkv + o_h) * D, BLOCK_D, ALIGNED)
            tl.store(p_part, b_dk, mask=m_hd)
            tl.store(p_part + Hkv * D, b_dv, mask=m_hd)


@kernel
def _pool_kernel(
    image_q,
    grad_out,
    image_dx,
    image_b,
    order,
    segment,
    parts,
    dimage_k,
    dimage_v,
    stride_iq,
    stride_do,
    stride_dik,  # (head, image)
    stride_div,
    Hkv,
    Tq,
    K,
    n_slots,
    pool_size,
    scale,
    BY_HEAD: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    order = _of_heads(order, n_slots, BY_HEAD)
    segment = _of_heads(segment, pool_size + 1, BY_HEAD)
    i_u = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_hd = (o_h < Hkv)[:, None] & (o_d < D)[None, :]
    begin = tl.load(segment + i_u).to(tl.int32)
    end = tl.load(segment + i_u + 1).to(tl.int32)
    is_popular = end - begin > BLOCK_SLOTS
    b_dk, b_dv = _sum_slots(
        image_q,
        grad_out,
        image_dx,
        image_b,
        order,
        stride_iq,
        stride_do,
        o_h,
        begin,
        tl.where(is_popular, begin, end),
        Hkv,
        Tq,
        K,
        D,
        G,
        ALIGNED,
        BLOCK_D,
        BLOCK_H,
        SLOTS,
    )
    first_block = begin // BLOCK_SLOTS
    for i_s in range(first_block, tl.where(is_popular, tl.cdiv(end, BLOCK_SLOTS), first_block)):
        # the image is at the end of the block in which it begins, unless it begins with the block
        i_end = tl.where(i_s * BLOCK_SLOTS < begin, 1, 0).to(tl.int64)
        # a vector of 16 bytes here would cost every program registers
        p_part = parts + ((i_s * 2 + i_end) * 2 * Hkv + o_h)[:, None] * D + o_d[None, :]
        b_dk += tl.load(p_part, mask=m_hd, other=0.0)
        b_dv += tl.load(p_part + Hkv * D, mask=m_hd, other=0.0)
    p_dik = columns(dimage_k + o_h * stride_dik[0] + i_u * stride_dik[1], BLOCK_D, ALIGNED)
    p_div = columns(dimage_v + o_h * stride_div[0] + i_u * stride_div[1], BLOCK_D, ALIGNED)
    tl.store(p_dik, (b_dk * scale).to(dimage_k.dtype.element_ty), mask=m_hd)
    tl.store(p_div, b_dv.to(dimage_v.dtype.element_ty), mask=m_hd)


def pool_gradients(inputs: Inputs, grad_out: Tensor, results: QueryResults, gradients: Gradients) -> None:
    """Writes the gradients of image_k and image_v (Hkv, U, D); inputs come from `kernel_inputs`."""
    image_k, image_v, image_index = inputs.image_k, inputs.image_v, inputs.image_index
    assert image_k is not None and image_v is not None and image_index is not None and results.image_b is not None
    image_q = inputs.q if inputs.image_q is None else inputs.image_q
    # computing only one of them is hardly less work
    dimage_k = empty_rows_like(image_k) if gradients.image_k is None else gradients.image_k
    dimage_v = empty_rows_like(image_v) if gradients.image_v is None else gradients.image_v
    kv_heads, pool_size, head_dim = dimage_k.shape
    if pool_size == 0:
        return
    order, segment = sorted_slots(image_index, pool_size)
    if inputs.by_head:
        image_index = image_index.transpose(0, 1).contiguous()
    n_slots = order.shape[-1]
    blocks = cdiv(n_slots, BLOCK_SLOTS)
    parts = results.image_b.new_empty(blocks, 2, 2, kv_heads, head_dim)
    of_shape = _constants(kv_heads, inputs.q.shape[1] // kv_heads, head_dim, inputs.q.dtype, inputs.by_head)
    constants = {"SLOTS": SLOTS, "BLOCK_SLOTS": BLOCK_SLOTS, **of_shape}
    head_blocks = cdiv(kv_heads, constants["BLOCK_H"])
    sizes = (kv_heads, image_q.shape[2], num_images(inputs), n_slots, pool_size)
    of_slots = (image_q, grad_out, results.image_dx, results.image_b)
    row_strides = (strides(image_q), strides(grad_out))
    launch(
        _popular_kernel,
        (blocks, head_blocks, 1),
        (*of_slots, image_index, order, segment, parts, *row_strides, *sizes),
        constants,
    )
    image_strides = (dimage_k.stride()[:2], dimage_v.stride()[:2])
    of_pool = (order, segment, parts, dimage_k, dimage_v)
    launch(
        _pool_kernel,
        (pool_size, head_blocks, 1),
        (*of_slots, *of_pool, *row_strides, *image_strides, *sizes, inputs.scale),
        constants,
    )


@cache
def _constants(kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, by_head: bool) -> dict[str, Any]:
    """The compile-time arguments of both kernels."""
    width = block_d(head_dim)
    most = 1 if by_head else max(1, COLUMNS // width)
    heads = min(1 << (kv_heads - 1).bit_length(), most)
    return {
        "BY_HEAD": by_head,
        "D": head_dim,
        "G": group,
        "ALIGNED": head_dim * dtype.itemsize % VECTOR == 0,
        "BLOCK_D": width,
        "BLOCK_H": heads,
        "num_warps": max(1, heads * width // (32 * THREAD_COLUMNS)),
        "enable_fp_fusion": True,
    }
