"""Gradients that belong to queries: dq, delta and all gradients of images. The maths is in backward.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Gradients, Inputs, num_images
from .backward_bias import Biases, bias_gradients
from .compiled import launch
from .launch import (
    ImageStrides,
    RowStrides,
    cdiv,
    choose_tiles,
    dense_strides,
    image_strides,
    kernel_constants,
    softcap_log2,
    strides,
)
from .primitives import (
    IMAGE_STAGES,
    LOG2E,
    cap_slope,
    capped,
    columns,
    image_score_terms,
    image_slots,
    kernel,
    load_bias,
    load_images,
    load_lse,
    load_rows,
    load_score_bias,
    over_key_tiles,
    row_pointers,
    tile_rows,
    used_keys,
    visible_keys,
)


@triton.jit
def _dq_step(b_dq, row_values, b_s, b_dp, b_k, b_v, INPUT_PRECISION: tl.constexpr):
    """Adds a key tile to dq / scale."""
    b_lse, b_delta, softcap_log2 = row_values
    b_p = tl.exp2(b_s - b_lse[:, None])
    b_ds = b_p * (b_dp - b_delta[:, None])
    if softcap_log2 is not None:
        b_ds *= cap_slope(b_s, softcap_log2)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=INPUT_PRECISION)


class QueryStrides(NamedTuple):
    """The strides of the tensors of `_query_kernel`, zeros for absent tensors."""

    q: RowStrides
    k: RowStrides
    v: RowStrides
    image_k: ImageStrides
    image_v: ImageStrides
    image_q: RowStrides
    out: RowStrides
    grad_out: RowStrides
    text_dq: RowStrides
    dq: RowStrides
    dimage_k: ImageStrides
    dimage_v: ImageStrides
    dimage_q: RowStrides


class QueryResults(NamedTuple):
    """The tensors that `_query_kernel` writes; None if nobody asks for them.

    They are allocated here, so that their addresses are aligned: Triton compiles again for other addresses (`kernel`),
    and on AMD for tensors from 2 GiB on.
    """

    dq: Tensor | None
    delta: Tensor  # (B, Hq, Tq), for `_key_kernel`
    dimage_k: Tensor | None  # dense layout: (B, Hkv, Tq, K, D), or one for each part of a group of heads
    dimage_v: Tensor | None
    dimage_q: Tensor | None
    image_dx: Tensor | None  # pooled layout: dx and b, (B, Hq, K, Tq)
    image_b: Tensor | None
    dimage_k_bias: Tensor | None  # partial sums, (tiles, B, Hkv, D)
    dimage_v_bias: Tensor | None
    dimage_logit_bias: Tensor | None  # (tiles, B, Hkv, BLOCK_H); tile n has part n % parts of a group's heads
    dimage_score_bias: Tensor | None  # (parts of a group, Hkv, B, K, Tq)


@kernel
def _query_kernel(
    q,
    k,
    v,
    image_k,
    image_v,
    image_q,
    image_index,
    image_mask,
    image_k_bias,
    image_v_bias,
    image_logit_bias,
    image_score_bias,
    first_key,
    cache_seqlens,
    out,
    lse,
    grad_out,
    grad_lse,
    grad_image_scores,
    text_dq,  # the text's part of dq; None: the kernel computes it
    results,  # QueryResults
    strides,  # QueryStrides
    stride_part,  # from one part's dimage_k and dimage_v to the next
    Hkv,
    Tq,
    Tk,
    K,
    scale,
    scale_log2,
    softcap_log2,  # None = no cap
    BY_HEAD: tl.constexpr,  # image_index is (B, Hkv, Tq, K)
    D: tl.constexpr,
    G: tl.constexpr,
    CAUSAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BY_SLABS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # a tile is that many positions by that many heads of the group
    BLOCK_H: tl.constexpr = BLOCK_G if BLOCK_G < BLOCK_M else BLOCK_M  # Triton 3.5 has no min of these
    BLOCK_T: tl.constexpr = BLOCK_M // BLOCK_H
    n_tiles = tl.cdiv(Tq * BLOCK_G, BLOCK_M)
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_b, i_h = i_bh // Hkv, i_bh % Hkv
    # under a causal mask the last tiles are the longest: they start first
    i_m = n_tiles - 1 - tl.program_id(0) % n_tiles

    o_t, o_h, m_row = tile_rows(i_m * BLOCK_M, i_h, Tq, G, BLOCK_G, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    # [BM, BD]
    b_q = load_rows(q, strides.q, i_b, o_h, o_t, D, BLOCK_D, ALIGNED)
    b_o = load_rows(out, strides.out, i_b, o_h, o_t, D, BLOCK_D, ALIGNED)
    b_do = load_rows(grad_out, strides.grad_out, i_b, o_h, o_t, D, BLOCK_D, ALIGNED)
    # [BM]
    o_row = (i_b * Hkv * G + o_h) * Tq + o_t
    b_lse = load_lse(lse, o_row, m_row)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if grad_lse is not None:
        b_delta -= tl.load(grad_lse + o_row)
    # where lse is -inf its gradient may be anything
    b_delta = tl.where(b_lse == float("inf"), 0.0, b_delta)
    tl.store(results.delta + o_row, b_delta, mask=m_row)

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if image_k is not None:
        b_u = b_q.to(tl.float32)
        if image_q is not None:
            b_u = load_rows(image_q, strides.image_q, i_b, o_h, o_t, D, BLOCK_D, ALIGNED).to(tl.float32)
        b_dof = b_do.to(tl.float32)
        b_t0, b_logit = image_score_terms(
            b_u, image_k_bias, image_logit_bias, i_h, o_h, scale_log2, D, BLOCK_D, ALIGNED
        )
        # the part of db - delta that all images of a row share, [BM]
        b_db0 = -b_delta
        if image_v_bias is not None:
            b_db0 += tl.sum(b_dof * load_bias(image_v_bias, i_h, D, BLOCK_D, ALIGNED)[None, :], 1)
        b_du = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        b_dt_sum = tl.zeros([BLOCK_M], tl.float32)
        b_dx_sum = tl.zeros([BLOCK_M], tl.float32)
        b_b_sum = tl.zeros([BLOCK_M], tl.float32)
        # one row per position, for the gradients of a group's shared images, [BT]
        o_t1 = i_m * BLOCK_M // BLOCK_G + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t1 = (o_t1 < Tq)[:, None] & m_d[None, :]
        o_part = (i_m % (BLOCK_G // BLOCK_H)).to(tl.int64) * stride_part
        for i_k in tl.range(0, K, num_stages=IMAGE_STAGES):
            o_slot, m_image = image_slots(image_index, image_mask, i_b, i_h, o_t, i_k, Hkv, Tq, K, BY_HEAD)
            # [BM, BD]
            b_ik = load_images(image_k, strides.image_k, i_b, i_h, o_t, o_slot, m_image, D, BLOCK_D, ALIGNED)
            b_iv = load_images(image_v, strides.image_v, i_b, i_h, o_t, o_slot, m_image, D, BLOCK_D, ALIGNED)
            # [BM]
            b_x = capped(tl.sum(b_u * b_ik, 1) * scale_log2 + b_t0, softcap_log2)
            b_bias = b_logit - b_lse
            if image_score_bias is not None:
                b_bias += load_score_bias(image_score_bias, i_b, o_t, i_k, Tq, K)
            b_b = tl.where(m_image, tl.exp2(b_x + b_bias), 0.0)
            b_dt = b_b * (tl.sum(b_dof * b_iv, 1) + b_db0)
            if grad_image_scores is not None:
                b_dt += tl.load(grad_image_scores + o_row * K + i_k, mask=m_row & m_image, other=0.0)
            b_dx = b_dt
            if softcap_log2 is not None:
                b_dx *= cap_slope(b_x, softcap_log2)
            b_du += b_dx[:, None] * b_ik
            b_dt_sum += b_dt
            b_dx_sum += b_dx
            b_b_sum += b_b
            if results.dimage_k is not None:
                # [BT, BD]
                b_dik = tl.sum(tl.reshape((b_dx * scale)[:, None] * b_u, [BLOCK_T, BLOCK_H, BLOCK_D]), 1)
                p_dik = row_pointers(results.dimage_k + o_part, strides.dimage_k, i_b, i_h, o_t1)
                p_dik = columns(p_dik + i_k * strides.dimage_k[3], BLOCK_D, ALIGNED)
                tl.store(p_dik, b_dik.to(results.dimage_k.dtype.element_ty), mask=m_t1)
            if results.dimage_v is not None:
                b_div = tl.sum(tl.reshape(b_b[:, None] * b_dof, [BLOCK_T, BLOCK_H, BLOCK_D]), 1)
                p_div = row_pointers(results.dimage_v + o_part, strides.dimage_v, i_b, i_h, o_t1)
                p_div = columns(p_div + i_k * strides.dimage_v[3], BLOCK_D, ALIGNED)
                tl.store(p_div, b_div.to(results.dimage_v.dtype.element_ty), mask=m_t1)
            if results.dimage_score_bias is not None:
                i_h_part = (i_m % (BLOCK_G // BLOCK_H)) * Hkv + i_h
                o_dscore = ((i_h_part * (tl.num_programs(0) // n_tiles // Hkv) + i_b) * K + i_k) * Tq + o_t1
                b_dscore = tl.sum(tl.reshape(b_dt, [BLOCK_T, BLOCK_H]), 1)
                tl.store(results.dimage_score_bias + o_dscore, b_dscore, mask=o_t1 < Tq)
            if results.image_dx is not None:
                o_coefficient = ((i_b * Hkv * G + o_h) * K + i_k) * Tq + o_t
                tl.store(results.image_dx + o_coefficient, b_dx, mask=m_row)
                tl.store(results.image_b + o_coefficient, b_b, mask=m_row)
        i_part = i_m * (tl.num_programs(0) // n_tiles) + i_bh
        if image_k_bias is not None:
            b_du += b_dx_sum[:, None] * load_bias(image_k_bias, i_h, D, BLOCK_D, ALIGNED)[None, :]
        if results.dimage_k_bias is not None:
            tl.store(results.dimage_k_bias + i_part * D + o_d, tl.sum((b_dx_sum * scale)[:, None] * b_u, 0), mask=m_d)
        if results.dimage_v_bias is not None:
            tl.store(results.dimage_v_bias + i_part * D + o_d, tl.sum(b_b_sum[:, None] * b_dof, 0), mask=m_d)
        if results.dimage_logit_bias is not None:
            b_dlogit = tl.sum(tl.reshape(b_dt_sum, [BLOCK_T, BLOCK_H]), 0)
            tl.store(results.dimage_logit_bias + i_part * BLOCK_H + tl.arange(0, BLOCK_H), b_dlogit)
        if results.dimage_q is not None:
            p_diq = columns(row_pointers(results.dimage_q, strides.dimage_q, i_b, o_h, o_t), BLOCK_D, ALIGNED)
            tl.store(p_diq, (b_du * scale).to(results.dimage_q.dtype.element_ty), mask=m_row[:, None] & m_d[None, :])
        if image_q is None:
            b_dq = b_du

    if results.dq is not None:
        if text_dq is None:
            Tk = used_keys(cache_seqlens, i_b, Tk)
            b_first, b_last = visible_keys(first_key, i_b, o_t, Tq, Tk, CAUSAL)
            b_dq = over_key_tiles(
                _dq_step,
                b_dq,
                (b_lse, b_delta, softcap_log2),
                row_pointers(q, strides.q, i_b, o_h, o_t) if BY_SLABS else b_q,
                row_pointers(grad_out, strides.grad_out, i_b, o_h, o_t) if BY_SLABS else b_do,
                k + i_b * strides.k[0] + i_h * strides.k[1],
                v + i_b * strides.v[0] + i_h * strides.v[1],
                strides.k[2],
                strides.v[2],
                first_key,
                b_first,
                b_last,
                0,
                Tk,
                Tk,
                scale_log2,
                softcap_log2,
                D,
                BLOCK_D,
                BLOCK_N,
                ALIGNED,
                INPUT_PRECISION,
            )
        p_dq = columns(row_pointers(results.dq, strides.dq, i_b, o_h, o_t), BLOCK_D, ALIGNED)
        b_dq = b_dq * scale
        if text_dq is not None:
            b_dq += load_rows(text_dq, strides.text_dq, i_b, o_h, o_t, D, BLOCK_D, ALIGNED).to(tl.float32)
        tl.store(p_dq, b_dq.to(results.dq.dtype.element_ty), mask=m_row[:, None] & m_d[None, :])


def query_gradients(
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_image_scores: Tensor | None,
    gradients: Gradients,
    text_dq: Tensor | None = None,
) -> QueryResults:
    """Writes all gradients that are not None, except k, v and a pool; inputs come from `kernel_inputs`.

    Args:
        text_dq: the text's part of the gradient of q, if it is computed already.

    Returns:
        delta for `key_gradients`, and image_dx and image_b for `pool_gradients` if it needs them.
    """
    q, k, v, image_k, image_v, image_q, image_index, *_ = inputs
    batch, q_heads, q_len, head_dim = q.shape
    _, kv_heads, k_len, _ = k.shape
    pooled = image_index is not None
    constants = kernel_constants(q, k, inputs.causal)
    block_g = constants["BLOCK_G"]
    joined = text_dq is not None
    tiles = choose_tiles("query joined" if joined else "query" if inputs.softcap is None else "query softcap", inputs)
    images = num_images(inputs)
    pool_wanted = pooled and (gradients.image_k is not None or gradients.image_v is not None)

    def scratch(wanted: bool, *size: int) -> Tensor | None:
        return lse.new_empty(size) if wanted else None

    row_tiles = cdiv(q_len * block_g, tiles.block_m)
    block_h = min(block_g, tiles.block_m)
    parts = block_g // block_h  # tiles among which the heads of a group are divided
    dense_k, dense_v = (None, None) if pooled else (gradients.image_k, gradients.image_v)
    if parts > 1:
        # a dense image belongs to all heads of its group: each part of the heads writes its own sum
        dense_k = scratch(dense_k is not None, parts, batch, kv_heads, q_len, images, head_dim)
        dense_v = scratch(dense_v is not None, parts, batch, kv_heads, q_len, images, head_dim)
    results = QueryResults(
        dq=gradients.q,
        delta=torch.empty_like(lse),
        dimage_k=dense_k,
        dimage_v=dense_v,
        dimage_q=gradients.image_q,
        image_dx=scratch(pool_wanted, batch, q_heads, images, q_len),
        image_b=scratch(pool_wanted, batch, q_heads, images, q_len),
        dimage_k_bias=scratch(gradients.image_k_bias is not None, row_tiles, batch, kv_heads, head_dim),
        dimage_v_bias=scratch(gradients.image_v_bias is not None, row_tiles, batch, kv_heads, head_dim),
        dimage_logit_bias=scratch(gradients.image_logit_bias is not None, row_tiles, batch, kv_heads, block_h),
        dimage_score_bias=scratch(gradients.image_score_bias is not None, parts * kv_heads, batch, images, q_len),
    )
    launch(
        _query_kernel,
        (row_tiles * batch * kv_heads, 1, 1),
        (
            *inputs.tensors,
            out,
            lse,
            grad_out,
            grad_lse,
            grad_image_scores,
            text_dq,
            results,
            QueryStrides(
                q=strides(q),
                k=strides(k),
                v=strides(v),
                image_k=image_strides(image_k, pooled),
                image_v=image_strides(image_v, pooled),
                image_q=strides(image_q),
                out=strides(out),
                grad_out=strides(grad_out),
                text_dq=strides(text_dq),
                dq=strides(gradients.q),
                dimage_k=dense_strides(dense_k),
                dimage_v=dense_strides(dense_v),
                dimage_q=strides(gradients.image_q),
            ),
            0 if parts == 1 else batch * kv_heads * q_len * images * head_dim,
            kv_heads,
            q_len,
            k_len,
            images,
            inputs.scale,
            inputs.scale * LOG2E.value,
            softcap_log2(inputs),
        ),
        {"BY_HEAD": inputs.by_head, **constants, **tiles.constants},
    )
    if parts > 1:
        _sum_into(gradients.image_k, dense_k)
        _sum_into(gradients.image_v, dense_v)
    bias_gradients(
        Biases(results.dimage_k_bias, results.dimage_v_bias, results.dimage_logit_bias),
        Biases(gradients.image_k_bias, gradients.image_v_bias, gradients.image_logit_bias),
        kv_heads,
        head_dim,
        q_heads // kv_heads,
        block_h,
    )
    if gradients.image_score_bias is not None:
        _sum_into(gradients.image_score_bias.transpose(1, 2), results.dimage_score_bias)
    return results


def _sum_into(gradient: Tensor | None, partial: Tensor | None) -> None:
    """Sums over the leading dimensions of `partial` that `gradient` lacks. Does nothing without a partial sum."""
    if gradient is None or partial is None:
        return
    dimensions = tuple(range(partial.dim() - gradient.dim()))
    if gradient.dtype == partial.dtype:
        torch.sum(partial, dimensions, out=gradient)
    else:  # with `out` of 16 bits, torch.sum would round before it adds
        gradient.copy_(partial.sum(dimensions))
