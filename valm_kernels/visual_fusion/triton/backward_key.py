"""Gradients that belong to text keys, dk and dv; the maths is in backward.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from valm_kernels.visual_fusion.inputs import Inputs
from valm_kernels.visual_fusion.triton.autotune import choose_tiles
from valm_kernels.visual_fusion.triton.launch import kernel_constants, softcap_log2, strides
from valm_kernels.visual_fusion.triton.primitives import (
    LOG2E,
    cap_slope,
    capped,
    load_lse,
    row_pointers,
    tile_rows,
    visible_keys,
)
from valm_kernels.visual_fusion.triton.tiles import Tiles

# Queries per step of the scan of first_key. Chosen by arithmetic, not yet measured on a card.
SCAN = 1024


@triton.jit
def _query_range(first_key, i_b, n_first, n_last, Tq, Tk, CAUSAL: tl.constexpr, BLOCK_SCAN: tl.constexpr):
    """The queries [begin, end) that may see some of the keys n_first..n_last; those from `full` on see all of them.

    Where first_key is not monotone, queries in between may see none: they are computed like the others, and masked.
    """
    if CAUSAL:
        begin = tl.maximum(n_first - (Tk - Tq), 0)
        full = tl.maximum(n_last - (Tk - Tq), 0)
    else:
        begin = 0
        full = 0
    end = Tq
    if first_key is not None:
        b_begin = tl.full([BLOCK_SCAN], Tq, tl.int32)
        b_end = tl.zeros([BLOCK_SCAN], tl.int32)
        b_full = tl.zeros([BLOCK_SCAN], tl.int32)
        for i_t in range(begin, Tq, BLOCK_SCAN):
            o_t = i_t + tl.arange(0, BLOCK_SCAN)
            b_first = tl.load(first_key + i_b * Tq + o_t, mask=o_t < Tq, other=Tk)
            m_some = b_first <= n_last
            b_begin = tl.minimum(b_begin, tl.where(m_some, o_t, Tq))
            b_end = tl.maximum(b_end, tl.where(m_some, o_t + 1, 0))
            b_full = tl.maximum(b_full, tl.where((b_first > n_first) & (o_t < Tq), o_t + 1, 0))
        begin = tl.min(b_begin, 0)
        end = tl.max(b_end, 0)
        full = tl.maximum(full, tl.max(b_full, 0))
    full = tl.minimum(tl.maximum(full, begin), tl.maximum(end, begin))
    return begin, full, end


@triton.jit
def _key_query_tiles(
    b_dk,
    b_dv,
    b_k,
    b_v,
    q,
    grad_out,
    lse,
    delta,
    first_key,
    stride_q,
    stride_do,
    i_b,
    i_h,
    o_n,
    begin,
    end,
    Hkv,
    Tq,
    Tk,
    scale_log2,
    softcap_log2,
    D: tl.constexpr,
    G: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Adds the queries of [begin, end) to dk / scale and dv. MASKED: some of them may not see every key."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    for i_t in range(begin, end, BLOCK_M // BLOCK_G):
        o_t, o_h, m_row = tile_rows(i_t, i_h, Tq, G, BLOCK_G, BLOCK_M)
        # [BM, BD]
        p_q = row_pointers(q, stride_q, i_b, o_h, o_t)
        p_do = row_pointers(grad_out, stride_do, i_b, o_h, o_t)
        # both addresses before both loads: the other order spills at D = 128
        b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_do = tl.load(p_do[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
        # [BM]
        o_row = (i_b * Hkv * G + o_h) * Tq + o_t
        b_lse = load_lse(lse, o_row, m_row)
        b_delta = tl.load(delta + o_row)
        # [BN, BM]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=INPUT_PRECISION) * scale_log2
        b_s = capped(b_s, softcap_log2)
        b_p = tl.exp2(b_s - b_lse[None, :])
        if MASKED:
            b_first, b_last = visible_keys(first_key, i_b, o_t, Tq, Tk, CAUSAL)
            b_p = tl.where((o_n[:, None] >= b_first[None, :]) & (o_n[:, None] <= b_last[None, :]), b_p, 0.0)
        # [BN, BD]
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=INPUT_PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=INPUT_PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        if softcap_log2 is not None:
            b_ds *= cap_slope(b_s, softcap_log2)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=INPUT_PRECISION)
    return b_dk, b_dv


@triton.jit
def _key_kernel(
    q,
    k,
    v,
    first_key,
    lse,
    delta,
    grad_out,
    dk,
    dv,
    stride_q,  # (batch, head, position), as for all
    stride_k,
    stride_v,
    stride_do,
    stride_dk,
    stride_dv,
    Hkv,
    Tq,
    Tk,
    scale,
    scale_log2,
    softcap_log2,
    D: tl.constexpr,
    G: tl.constexpr,
    CAUSAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    n_tiles = tl.cdiv(Tk, BLOCK_N)
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_b, i_h = i_bh // Hkv, i_bh % Hkv
    n_first = tl.program_id(0) % n_tiles * BLOCK_N
    n_last = tl.minimum(n_first + BLOCK_N, Tk) - 1

    o_n = n_first + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = (o_n < Tk)[:, None] & (o_d < D)[None, :]
    o_row = o_n.to(tl.int64)[:, None]
    # [BN, BD]; what is computed for keys past the last is never stored
    b_k = tl.load(k + i_b * stride_k[0] + i_h * stride_k[1] + o_row * stride_k[2] + o_d[None, :], mask=m_n, other=0.0)
    b_v = tl.load(v + i_b * stride_v[0] + i_h * stride_v[1] + o_row * stride_v[2] + o_d[None, :], mask=m_n, other=0.0)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    begin, full, end = _query_range(first_key, i_b, n_first, n_last, Tq, Tk, CAUSAL, BLOCK_SCAN)
    # the masked part ends on a border of its own tiles
    full = begin + tl.cdiv(full - begin, BLOCK_M // BLOCK_G) * (BLOCK_M // BLOCK_G)
    for i_part in tl.static_range(0 if CAUSAL or first_key is not None else 1, 2):
        b_dk, b_dv = _key_query_tiles(
            b_dk,
            b_dv,
            b_k,
            b_v,
            q,
            grad_out,
            lse,
            delta,
            first_key,
            stride_q,
            stride_do,
            i_b,
            i_h,
            o_n,
            begin if i_part == 0 else full,
            tl.minimum(full, end) if i_part == 0 else end,
            Hkv,
            Tq,
            Tk,
            scale_log2,
            softcap_log2,
            D,
            G,
            CAUSAL,
            BLOCK_D,
            BLOCK_G,
            BLOCK_M,
            i_part == 0,
            INPUT_PRECISION,
        )
    p_dk = dk + i_b * stride_dk[0] + i_h * stride_dk[1] + o_row * stride_dk[2] + o_d[None, :]
    p_dv = dv + i_b * stride_dv[0] + i_h * stride_dv[1] + o_row * stride_dv[2] + o_d[None, :]
    tl.store(p_dk, (b_dk * scale).to(dk.dtype.element_ty), mask=m_n)
    tl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=m_n)


def key_gradients(inputs: Inputs, lse: Tensor, delta: Tensor, grad_out: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Fills dk and dv; inputs are those of `kernel_inputs`."""
    q, k, v = inputs[:3]
    batch, kv_heads, k_len = k.shape[:3]
    constants = kernel_constants(q, k, inputs.causal)

    def launch(tiles: Tiles) -> None:
        _key_kernel[(triton.cdiv(k_len, tiles.block_n) * batch * kv_heads,)](
            q,
            k,
            v,
            inputs.first_key,
            lse,
            delta,
            grad_out,
            dk,
            dv,
            *(strides(x) for x in (q, k, v, grad_out, dk, dv)),
            kv_heads,
            q.shape[2],
            k_len,
            inputs.scale,
            inputs.scale * LOG2E.value,
            softcap_log2(inputs),
            **constants,
            BLOCK_M=max(tiles.block_m, constants["BLOCK_G"]),
            BLOCK_N=tiles.block_n,
            BLOCK_SCAN=SCAN,
            **tiles.options(),
        )

    launch(choose_tiles("key" if inputs.softcap is None else "key softcap", q, launch))
