"""Gradients that belong to text keys, dk and dv; the maths is in backward.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Gradients, Inputs
from ..layout import empty_tokens_first
from .compiled import launch
from .launch import RowStrides, cdiv, choose_tiles, kernel_constants, softcap_log2, strides
from .primitives import (
    LOG2E,
    cap_slope,
    capped,
    columns,
    kernel,
    load_lse,
    products,
    row_pointers,
    tile_rows,
    used_keys,
    visible_keys,
)

# Queries per step of the scan of first_key. Chosen by arithmetic, not yet measured on a GPU.
SCAN = 1024


@triton.jit
def _causal_range(n_first, n_last, Tq, Tk, CAUSAL: tl.constexpr):
    """The queries [begin, end) that may see some of the keys n_first..n_last; those from `full` on see all of them."""
    begin = 0
    full = 0
    if CAUSAL:
        begin = tl.maximum(n_first - (Tk - Tq), 0)
        full = tl.maximum(n_last - (Tk - Tq), 0)
    return begin, full, Tq


@kernel
def _query_range_kernel(
    first_key,
    cache_seqlens,
    query_range,  # (B, key tiles, 3)
    Tq,
    Tk,
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    """`_causal_range` of every key tile under first_key.

    If first_key is not monotone, queries in the range may see none of the keys: they are computed and masked. This is a
    separate kernel, because loops over bounds that `_key_kernel` computes itself are not pipelined.
    """
    n_tiles = tl.cdiv(Tk, BLOCK_N)
    i_b = (tl.program_id(0) // n_tiles).to(tl.int64)
    n_first = tl.program_id(0) % n_tiles * BLOCK_N
    Tk = used_keys(cache_seqlens, i_b, Tk)
    n_last = tl.minimum(n_first + BLOCK_N, Tk) - 1
    begin, full, end = _causal_range(n_first, n_last, Tq, Tk, CAUSAL)
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
    p_range = query_range + tl.program_id(0).to(tl.int64) * 3
    tl.store(p_range, begin)
    tl.store(p_range + 1, full)
    tl.store(p_range + 2, end)


@triton.jit
def _key_query_tiles(
    b_dk,
    b_dv,
    k,  # rows for `products`
    v,
    m_key,
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
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BY_SLABS: tl.constexpr,
):
    """Adds the queries of [begin, end) to dk / scale and dv. MASKED: some queries may not see every key."""
    m_d = tl.arange(0, BLOCK_D) < D
    for i_r in range(begin * BLOCK_G, end * BLOCK_G, BLOCK_M):
        o_t, o_h, m_row = tile_rows(i_r, i_h, Tq, G, BLOCK_G, BLOCK_M)
        # [BM, BD]
        p_q = row_pointers(q, stride_q, i_b, o_h, o_t)
        p_do = row_pointers(grad_out, stride_do, i_b, o_h, o_t)
        if not BY_SLABS:
            p_qd, p_dod = columns(p_q, BLOCK_D, ALIGNED), columns(p_do, BLOCK_D, ALIGNED)
            # both addresses before both loads: the other order spills at D = 128
            b_q = tl.load(p_qd, mask=m_d[None, :], other=0.0)
            b_do = tl.load(p_dod, mask=m_d[None, :], other=0.0)
        # [BM]
        o_row = (i_b * Hkv * G + o_h) * Tq + o_t
        b_lse = load_lse(lse, o_row, m_row)
        b_delta = tl.load(delta + o_row)
        # [BN, BM]
        queries = p_q if BY_SLABS else b_q
        b_s = products(k, queries, m_key, None, i_r, D, BLOCK_D, ALIGNED, INPUT_PRECISION) * scale_log2
        b_s = capped(b_s, softcap_log2)
        b_p = tl.exp2(b_s - b_lse[None, :])
        if MASKED:
            b_first, b_last = visible_keys(first_key, i_b, o_t, Tq, Tk, CAUSAL)
            b_p = tl.where((o_n[:, None] >= b_first[None, :]) & (o_n[:, None] <= b_last[None, :]), b_p, 0.0)
        # [BN, BD]
        if BY_SLABS:
            # both at once, as above, are more float32 than there are registers
            b_do = tl.load(columns(p_do, BLOCK_D, ALIGNED), mask=m_d[None, :], other=0.0)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=INPUT_PRECISION)
        if softcap_log2 is not None:
            # before the next product: after it, b_s is in registers for longer, and D = 128 spills
            b_p *= cap_slope(b_s, softcap_log2)
        gradients = p_do if BY_SLABS else b_do
        b_dp = products(v, gradients, m_key, None, i_r, D, BLOCK_D, ALIGNED, INPUT_PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        if BY_SLABS:
            b_q = tl.load(columns(p_q, BLOCK_D, ALIGNED), mask=m_d[None, :], other=0.0)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=INPUT_PRECISION)
    return b_dk, b_dv


class KeyStrides(NamedTuple):
    """The strides of the tensors of `_key_kernel`."""

    q: RowStrides
    k: RowStrides
    v: RowStrides
    grad_out: RowStrides
    dk: RowStrides
    dv: RowStrides


@kernel
def _key_kernel(
    q,
    k,
    v,
    first_key,
    cache_seqlens,
    query_range,  # with first_key: begin, full and end of every (batch row, key tile)
    lse,
    delta,
    grad_out,
    dk,
    dv,
    strides,  # KeyStrides
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
    BY_SLABS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n_tiles = tl.cdiv(Tk, BLOCK_N)
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_b, i_h = i_bh // Hkv, i_bh % Hkv
    n_first = tl.program_id(0) % n_tiles * BLOCK_N
    n_keys = used_keys(cache_seqlens, i_b, Tk)
    n_last = tl.minimum(n_first + BLOCK_N, n_keys) - 1

    o_n = n_first + tl.arange(0, BLOCK_N)
    m_n = (o_n < n_keys)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    o_row = o_n.to(tl.int64)
    # [BN], or [BN, BD]; what is computed for keys past the last is never stored
    k_rows = row_pointers(k, strides.k, i_b, i_h, o_row)
    v_rows = row_pointers(v, strides.v, i_b, i_h, o_row)
    if not BY_SLABS:
        k_rows = tl.load(columns(k_rows, BLOCK_D, ALIGNED), mask=m_n, other=0.0)
        v_rows = tl.load(columns(v_rows, BLOCK_D, ALIGNED), mask=m_n, other=0.0)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    if first_key is not None:
        p_range = query_range + (i_b * n_tiles + tl.program_id(0) % n_tiles) * 3
        begin, full, end = tl.load(p_range), tl.load(p_range + 1), tl.load(p_range + 2)
    else:
        begin, full, end = _causal_range(n_first, n_last, Tq, n_keys, CAUSAL)
    # the masked part ends on a border of its own tiles
    BLOCK_T: tl.constexpr = max(1, BLOCK_M // BLOCK_G)
    full = begin + (full - begin + BLOCK_T - 1) // BLOCK_T * BLOCK_T
    if cache_seqlens is not None:
        # a tile whose keys are all unused needs no query
        end = tl.where(n_first < n_keys, end, begin)
        full = tl.maximum(full, begin)
    for i_part in tl.static_range(0 if CAUSAL or first_key is not None else 1, 2):
        b_dk, b_dv = _key_query_tiles(
            b_dk,
            b_dv,
            k_rows,
            v_rows,
            o_n < n_keys,
            q,
            grad_out,
            lse,
            delta,
            first_key,
            strides.q,
            strides.grad_out,
            i_b,
            i_h,
            o_n,
            begin if i_part == 0 else full,
            tl.minimum(full, end) if i_part == 0 else end,
            Hkv,
            Tq,
            n_keys,
            scale_log2,
            softcap_log2,
            D,
            G,
            CAUSAL,
            ALIGNED,
            BLOCK_D,
            BLOCK_G,
            BLOCK_M,
            i_part == 0,
            INPUT_PRECISION,
            BY_SLABS,
        )
    p_dk = columns(row_pointers(dk, strides.dk, i_b, i_h, o_row), BLOCK_D, ALIGNED)
    p_dv = columns(row_pointers(dv, strides.dv, i_b, i_h, o_row), BLOCK_D, ALIGNED)
    m_stored = m_n
    if cache_seqlens is not None:
        m_stored = (o_n < Tk)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
        b_dk = tl.where(m_n, b_dk, 0.0)
        b_dv = tl.where(m_n, b_dv, 0.0)
    tl.store(p_dk, (b_dk * scale).to(dk.dtype.element_ty), mask=m_stored)
    tl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=m_stored)


def key_gradients(inputs: Inputs, lse: Tensor, delta: Tensor, grad_out: Tensor, gradients: Gradients) -> None:
    """Writes the gradients of k and v; inputs come from `kernel_inputs`."""
    q, k, v = inputs[:3]
    batch, kv_heads, k_len, _ = k.shape
    constants = kernel_constants(q, k, inputs.causal)
    tiles = choose_tiles("key" if inputs.softcap is None else "key softcap", inputs)
    # computing only one of them is no less work
    dk = empty_tokens_first(k) if gradients.k is None else gradients.k
    dv = empty_tokens_first(v) if gradients.v is None else gradients.v

    key_tiles = cdiv(k_len, tiles.block_n)
    query_range = None
    if inputs.first_key is not None:
        query_range = torch.empty(batch, key_tiles, 3, dtype=torch.int32, device=q.device)
        launch(
            _query_range_kernel,
            (batch * key_tiles, 1, 1),
            (inputs.first_key, inputs.cache_seqlens, query_range, q.shape[2], k_len),
            {"CAUSAL": inputs.causal, "BLOCK_N": tiles.block_n, "BLOCK_SCAN": SCAN},
        )
    launch(
        _key_kernel,
        (key_tiles * batch * kv_heads, 1, 1),
        (
            q,
            k,
            v,
            inputs.first_key,
            inputs.cache_seqlens,
            query_range,
            lse,
            delta,
            grad_out,
            dk,
            dv,
            KeyStrides(
                q=strides(q), k=strides(k), v=strides(v), grad_out=strides(grad_out), dk=strides(dk), dv=strides(dv)
            ),
            kv_heads,
            q.shape[2],
            k_len,
            inputs.scale,
            inputs.scale * LOG2E.value,
            softcap_log2(inputs),
        ),
        {**constants, **tiles.constants},
    )
