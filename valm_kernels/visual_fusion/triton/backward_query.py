"""Gradients that belong to queries: dq, delta and all of the images'; the maths is in backward.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from valm_kernels.visual_fusion.inputs import Inputs
from valm_kernels.visual_fusion.triton.autotune import choose_tiles
from valm_kernels.visual_fusion.triton.launch import (
    image_strides,
    kernel_constants,
    num_images,
    softcap_log2,
    strides,
)
from valm_kernels.visual_fusion.triton.primitives import (
    LOG2E,
    cap_slope,
    capped,
    image_score_terms,
    image_slots,
    load_bias,
    load_images,
    load_lse,
    load_rows,
    over_key_tiles,
    row_pointers,
    tile_rows,
    visible_keys,
)
from valm_kernels.visual_fusion.triton.tiles import Tiles


@triton.jit
def _dq_step(b_dq, row_values, b_s, b_k, b_v, INPUT_PRECISION: tl.constexpr):
    """Adds a key tile to dq / scale."""
    b_do, b_lse, b_delta, softcap_log2 = row_values
    b_p = tl.exp2(b_s - b_lse[:, None])
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=INPUT_PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if softcap_log2 is not None:
        b_ds *= cap_slope(b_s, softcap_log2)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=INPUT_PRECISION)


@triton.jit
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
    first_key,
    out,
    lse,
    grad_out,
    grad_lse,
    dq,
    delta,  # (B, Hq, Tq), for _key_kernel
    dimage_k,  # dense layout: (B, Hkv, Tq, K, D)
    dimage_v,
    dimage_q,  # None: the images' share is part of dq
    image_dx,  # pooled layout: dx and b, (B, Hq, K, Tq)
    image_b,
    dimage_k_bias,  # partial sums, (tiles, B, Hkv, D)
    dimage_v_bias,
    dimage_logit_bias,  # (tiles, B, Hkv, BLOCK_G)
    stride_q,  # (batch, head, position), as for all but image_k, image_v and their gradients
    stride_k,
    stride_v,
    stride_ik,  # (batch, head, position, slot)
    stride_iv,
    stride_iq,
    stride_o,
    stride_do,
    stride_dq,
    stride_dik,
    stride_div,
    stride_diq,
    Hkv,
    Tq,
    Tk,
    K,
    scale,
    scale_log2,
    softcap_log2,  # None = no cap
    D: tl.constexpr,
    G: tl.constexpr,
    CAUSAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    BLOCK_T: tl.constexpr = BLOCK_M // BLOCK_G
    n_tiles = tl.cdiv(Tq, BLOCK_T)
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_b, i_h = i_bh // Hkv, i_bh % Hkv
    # under a causal mask the last tiles are the longest: they start first
    i_m = n_tiles - 1 - tl.program_id(0) % n_tiles

    o_t, o_h, m_row = tile_rows(i_m * BLOCK_T, i_h, Tq, G, BLOCK_G, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    # [BM, BD]
    b_q = load_rows(q, stride_q, i_b, o_h, o_t, D, BLOCK_D)
    b_o = load_rows(out, stride_o, i_b, o_h, o_t, D, BLOCK_D)
    b_do = load_rows(grad_out, stride_do, i_b, o_h, o_t, D, BLOCK_D)
    # [BM]
    o_row = (i_b * Hkv * G + o_h) * Tq + o_t
    b_lse = load_lse(lse, o_row, m_row)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if grad_lse is not None:
        b_delta -= tl.load(grad_lse + o_row)
    # where lse is -inf its gradient may be anything
    b_delta = tl.where(b_lse == float("inf"), 0.0, b_delta)
    tl.store(delta + o_row, b_delta, mask=m_row)

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if image_k is not None:
        b_u = b_q.to(tl.float32)
        if image_q is not None:
            b_u = load_rows(image_q, stride_iq, i_b, o_h, o_t, D, BLOCK_D).to(tl.float32)
        b_dof = b_do.to(tl.float32)
        b_t0, b_logit = image_score_terms(b_u, image_k_bias, image_logit_bias, i_h, o_h, scale_log2, D, BLOCK_D)
        # what all images of a row share in db - delta, [BM]
        b_db0 = -b_delta
        if image_v_bias is not None:
            b_db0 += tl.sum(b_dof * load_bias(image_v_bias, i_h, D, BLOCK_D)[None, :], 1)
        b_du = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        b_dt_sum = tl.zeros([BLOCK_M], tl.float32)
        b_dx_sum = tl.zeros([BLOCK_M], tl.float32)
        b_b_sum = tl.zeros([BLOCK_M], tl.float32)
        # one row per position: where the gradients of a group's shared images go, [BT]
        o_t1 = i_m * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t1 = (o_t1 < Tq)[:, None] & m_d[None, :]
        for i_k in range(0, K):
            o_slot, m_image = image_slots(image_index, image_mask, i_b, o_t, i_k, Tq, K)
            # [BM, BD]
            b_ik = load_images(image_k, stride_ik, i_b, i_h, o_t, o_slot, m_image, D, BLOCK_D)
            b_iv = load_images(image_v, stride_iv, i_b, i_h, o_t, o_slot, m_image, D, BLOCK_D)
            # [BM]
            b_x = capped(tl.sum(b_u * b_ik, 1) * scale_log2 + b_t0, softcap_log2)
            b_b = tl.where(m_image, tl.exp2(b_x + (b_logit - b_lse)), 0.0)
            b_dt = b_b * (tl.sum(b_dof * b_iv, 1) + b_db0)
            b_dx = b_dt
            if softcap_log2 is not None:
                b_dx *= cap_slope(b_x, softcap_log2)
            b_du += b_dx[:, None] * b_ik
            b_dt_sum += b_dt
            b_dx_sum += b_dx
            b_b_sum += b_b
            if image_index is None:
                # [BT, BD]
                b_dik = tl.sum(tl.reshape((b_dx * scale)[:, None] * b_u, [BLOCK_T, BLOCK_G, BLOCK_D]), 1)
                b_div = tl.sum(tl.reshape(b_b[:, None] * b_dof, [BLOCK_T, BLOCK_G, BLOCK_D]), 1)
                p_dik = row_pointers(dimage_k, stride_dik, i_b, i_h, o_t1) + i_k * stride_dik[3]
                p_div = row_pointers(dimage_v, stride_div, i_b, i_h, o_t1) + i_k * stride_div[3]
                tl.store(p_dik[:, None] + o_d[None, :], b_dik.to(dimage_k.dtype.element_ty), mask=m_t1)
                tl.store(p_div[:, None] + o_d[None, :], b_div.to(dimage_v.dtype.element_ty), mask=m_t1)
            else:
                o_coefficient = ((i_b * Hkv * G + o_h) * K + i_k) * Tq + o_t
                tl.store(image_dx + o_coefficient, b_dx, mask=m_row)
                tl.store(image_b + o_coefficient, b_b, mask=m_row)
        i_part = i_m * (tl.num_programs(0) // n_tiles) + i_bh
        if image_k_bias is not None:
            b_du += b_dx_sum[:, None] * load_bias(image_k_bias, i_h, D, BLOCK_D)[None, :]
            tl.store(dimage_k_bias + i_part * D + o_d, tl.sum((b_dx_sum * scale)[:, None] * b_u, 0), mask=m_d)
        if image_v_bias is not None:
            tl.store(dimage_v_bias + i_part * D + o_d, tl.sum(b_b_sum[:, None] * b_dof, 0), mask=m_d)
        if image_logit_bias is not None:
            o_g = tl.arange(0, BLOCK_G)
            b_dlogit = tl.sum(tl.reshape(b_dt_sum, [BLOCK_T, BLOCK_G]), 0)
            tl.store(dimage_logit_bias + i_part * BLOCK_G + o_g, b_dlogit)
        if image_q is not None:
            p_diq = row_pointers(dimage_q, stride_diq, i_b, o_h, o_t)
            m_diq = m_row[:, None] & m_d[None, :]
            tl.store(p_diq[:, None] + o_d[None, :], (b_du * scale).to(dimage_q.dtype.element_ty), mask=m_diq)
        else:
            b_dq = b_du

    b_first, b_last = visible_keys(first_key, i_b, o_t, Tq, Tk, CAUSAL)
    b_dq = over_key_tiles(
        _dq_step,
        b_dq,
        (b_do, b_lse, b_delta, softcap_log2),
        b_q,
        k + i_b * stride_k[0] + i_h * stride_k[1],
        v + i_b * stride_v[0] + i_h * stride_v[1],
        stride_k[2],
        stride_v[2],
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
        INPUT_PRECISION,
    )
    p_dq = row_pointers(dq, stride_dq, i_b, o_h, o_t)
    tl.store(p_dq[:, None] + o_d[None, :], (b_dq * scale).to(dq.dtype.element_ty), mask=m_row[:, None] & m_d[None, :])


@dataclass(frozen=True)
class QueryResults:
    """What `query_gradients` computes besides the gradients it fills, all float32; None where an input is absent."""

    delta: Tensor  # (B, Hq, Tq)
    image_dx: Tensor | None  # pooled layout: dx and b, (B, Hq, K, Tq)
    image_b: Tensor | None
    # one partial sum of the bias gradients per program
    image_k_bias: Tensor | None  # (tiles, B, Hkv, D)
    image_v_bias: Tensor | None
    image_logit_bias: Tensor | None  # (tiles, B, Hkv, BLOCK_G)


def query_gradients(
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    dq: Tensor,
    dimage_k: Tensor | None,
    dimage_v: Tensor | None,
    dimage_q: Tensor | None,
) -> QueryResults:
    """Fills dq, dimage_q and, in the dense layout, dimage_k and dimage_v; inputs are those of `kernel_inputs`."""
    q, k, v, image_k, image_v, image_q, image_index, *_ = inputs
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    pooled = image_index is not None
    constants = kernel_constants(q, k, inputs.causal)
    block_g = constants["BLOCK_G"]
    images = num_images(image_k, image_index)

    def scratch(wanted: bool, *size: int) -> Tensor | None:
        return torch.empty(size, dtype=torch.float32, device=q.device) if wanted else None

    def launch(tiles: Tiles) -> QueryResults:
        block_m = max(tiles.block_m, block_g)
        row_tiles = triton.cdiv(q_len * block_g, block_m)
        results = QueryResults(
            delta=torch.empty(batch, q_heads, q_len, dtype=torch.float32, device=q.device),
            image_dx=scratch(pooled, batch, q_heads, images, q_len),
            image_b=scratch(pooled, batch, q_heads, images, q_len),
            image_k_bias=scratch(inputs.image_k_bias is not None, row_tiles, batch, kv_heads, head_dim),
            image_v_bias=scratch(inputs.image_v_bias is not None, row_tiles, batch, kv_heads, head_dim),
            image_logit_bias=scratch(inputs.image_logit_bias is not None, row_tiles, batch, kv_heads, block_g),
        )
        _query_kernel[(row_tiles * batch * kv_heads,)](
            *inputs.tensors,
            out,
            lse,
            grad_out,
            grad_lse,
            dq,
            results.delta,
            dimage_k,
            dimage_v,
            dimage_q,
            results.image_dx,
            results.image_b,
            results.image_k_bias,
            results.image_v_bias,
            results.image_logit_bias,
            *(strides(x) for x in (q, k, v)),
            *(image_strides(x, pooled) for x in (image_k, image_v)),
            *(strides(x) for x in (image_q, out, grad_out, dq)),
            *(image_strides(x, pooled) for x in (dimage_k, dimage_v)),
            strides(dimage_q),
            kv_heads,
            q_len,
            k_len,
            images,
            inputs.scale,
            inputs.scale * LOG2E.value,
            softcap_log2(inputs),
            **constants,
            BLOCK_M=block_m,
            BLOCK_N=tiles.block_n,
            **tiles.options(),
        )
        return results

    return launch(choose_tiles("query", q, launch))
