"""Forward of `visual_fusion_attn` in Triton: one pass over a query tile's images and then over its text keys.

For a row (query i of head h), with scores in units of log 2 and a running maximum m:

    t_k = cap(scale u.(image_k_k + image_k_bias)) + image_logit_bias + image_score_bias_k      s_j = cap(scale q.k_j)
    l   = sum_k 2^(t_k - m) + sum_j 2^(s_j - m)
    out = (sum_k 2^(t_k - m) (image_v_k + image_v_bias) + sum_j 2^(s_j - m) v_j) / l,      lse = (m + log2 l) ln 2

u is image_q if given, otherwise q. cap(x) = c tanh(x / c) with softcap c, otherwise x.

Each row sees its own K images, so their scores are element-wise sums; they enter the softmax first. All rows of the
tile share the text keys, which go through tensor-core products (FlashAttention-2, Dao 2023, algorithm 1).
image_k_bias adds u.image_k_bias to every image product, and image_v_bias is weighted by the sum of the image weights,
which is l after the image loop: neither bias is ever added to an image vector.

If attention to the text is computed already (joined.py), its out and lse replace the keys: they enter as one more term
of the sums, with weight 2^(lse_text - m).

If there are too few tiles to fill the GPU (decoding), the keys that a tile may see are split, and the images are the
last split. Each split writes a float32 partial result with its own lse, and `_merge_kernel` joins them.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_pool
from ..inputs import Inputs, num_images
from ..layout import empty_rows_like
from .compiled import launch
from .launch import (
    ImageStrides,
    RowStrides,
    cdiv,
    choose_tiles,
    image_strides,
    kernel_constants,
    kernel_inputs,
    multiprocessors,
    softcap_log2,
    strides,
)
from .primitives import (
    IMAGE_STAGES,
    LN2,
    LOG2E,
    capped,
    columns,
    image_score_terms,
    image_slots,
    kernel,
    load_bias,
    load_images,
    load_rows,
    load_score_bias,
    over_key_tiles,
    row_pointers,
    tile_rows,
    used_keys,
    visible_keys,
)

# To find a wrong index: the host reads all indices before each launch.
CHECK_INDEX = os.environ.get("VALM_KERNELS_CHECK_INDEX") == "1"

# A row's running maximum before its first key. It is finite, so that 2^(-inf - m) is 0, not NaN, before the first key.
NO_SCORE = tl.constexpr(-1.0e30)

# Up to this many rows per key-value head (queries x group) the "decode" tiles are used: a larger tile would repeat the
# last row, 8 times the products at 128.
DECODE_ROWS = 16
# Bounds of a split: shorter splits gain less than the merge costs, which reads the splits of a row one by one. Chosen
# by arithmetic, not yet measured on a GPU.
MIN_KEYS_PER_SPLIT = 256
MAX_SPLITS = 64


def splits_of(programs: int, k_len: int, has_images: bool, multiprocessors: int, decoding: bool) -> int:
    """The number of parts into which the keys and images are split.

    If the programs leave multiprocessors idle, two programs for each; the images are then one more part. Such a call
    reads every key once, at the rate of the multiprocessors that read: 12 heads occupy 12 of an H100's 132. A call with
    many queries writes and reads a float32 partial result of each for every split, so it is split only if its programs
    occupy a quarter of the multiprocessors at most.
    """
    if programs >= multiprocessors or (not decoding and 4 * programs > multiprocessors):
        return 1
    most = MAX_SPLITS - has_images
    return max(1, min(cdiv(2 * multiprocessors, programs), k_len // MIN_KEYS_PER_SPLIT, most)) + has_images


@triton.jit
def _softmax_step(carry, row_values, b_s, b_dp, b_k, b_v, INPUT_PRECISION: tl.constexpr):
    """Adds a key tile to the running softmax."""
    b_acc, b_m, b_l = carry
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_alpha = tl.exp2(b_m - b_m_new)
    b_p = tl.exp2(b_s - b_m_new[:, None])
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=INPUT_PRECISION)
    return b_acc, b_m_new, b_l


@triton.jit
def _softmax_row_step(carry, b_s, b_v):
    """Adds one value of each row, [BM, BD], with its score, [BM], to the running softmax."""
    b_acc, b_m, b_l = carry
    b_m_new = tl.maximum(b_m, b_s)
    b_alpha = tl.exp2(b_m - b_m_new)
    b_p = tl.exp2(b_s - b_m_new)
    b_l = b_l * b_alpha + b_p
    b_acc = b_acc * b_alpha[:, None] + b_p[:, None] * b_v
    return b_acc, b_m_new, b_l


class ForwardStrides(NamedTuple):
    """The strides of the tensors of `_forward_kernel` except text_out, zeros for absent tensors."""

    q: RowStrides
    k: RowStrides
    v: RowStrides
    image_k: ImageStrides
    image_v: ImageStrides
    image_q: RowStrides
    out: RowStrides


@kernel
def _forward_kernel(
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
    image_scores,  # (B, Hq, Tq, K) float32
    text_out,  # output of attention to only the text; None: the kernel computes it
    text_lse,
    strides,  # ForwardStrides
    stride_part,  # from one split's out to the next
    stride_to,  # of text_out
    Hkv,
    Tq,
    Tk,
    K,
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
    n_tiles = tl.cdiv(Tq * BLOCK_G, BLOCK_M)
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_b, i_h = i_bh // Hkv, i_bh % Hkv
    # under a causal mask the last tiles are the longest: they start first
    i_m = n_tiles - 1 - tl.program_id(0) % n_tiles
    i_s = tl.program_id(1).to(tl.int64)

    o_t, o_h, m_row = tile_rows(i_m * BLOCK_M, i_h, Tq, G, BLOCK_G, BLOCK_M)
    # [BM, BD]
    b_q = load_rows(q, strides.q, i_b, o_h, o_t, D, BLOCK_D, ALIGNED)

    b_m = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if image_k is not None:
        b_u = b_q.to(tl.float32)
        if image_q is not None:
            b_u = load_rows(image_q, strides.image_q, i_b, o_h, o_t, D, BLOCK_D, ALIGNED).to(tl.float32)
        b_t0, b_logit = image_score_terms(
            b_u, image_k_bias, image_logit_bias, i_h, o_h, scale_log2, D, BLOCK_D, ALIGNED
        )
        n_images = tl.where(i_s == tl.num_programs(1) - 1, K, 0)
        for i_k in tl.range(0, n_images, num_stages=IMAGE_STAGES):
            o_slot, m_image = image_slots(image_index, image_mask, i_b, i_h, o_t, i_k, Hkv, Tq, K, BY_HEAD)
            # [BM, BD]
            b_ik = load_images(image_k, strides.image_k, i_b, i_h, o_t, o_slot, m_image, D, BLOCK_D, ALIGNED)
            b_iv = load_images(image_v, strides.image_v, i_b, i_h, o_t, o_slot, m_image, D, BLOCK_D, ALIGNED)
            # [BM]
            b_t = capped(tl.sum(b_u * b_ik, 1) * scale_log2 + b_t0, softcap_log2) + b_logit
            if image_score_bias is not None:
                b_t += load_score_bias(image_score_bias, i_b, o_t, i_k, Tq, K)
            b_t = tl.where(m_image, b_t, float("-inf"))
            if image_scores is not None:
                o_score = ((i_b * Hkv * G + o_h) * Tq + o_t) * K + i_k
                tl.store(image_scores + o_score, b_t * LN2, mask=m_row)
            b_acc, b_m, b_l = _softmax_row_step((b_acc, b_m, b_l), b_t, b_iv)
        if image_v_bias is not None:
            b_acc += b_l[:, None] * load_bias(image_v_bias, i_h, D, BLOCK_D, ALIGNED)[None, :]

    if text_out is not None:
        b_text = load_rows(text_out, stride_to, i_b, o_h, o_t, D, BLOCK_D, ALIGNED)
        b_text_lse = tl.load(text_lse + (i_b * Hkv * G + o_h) * Tq + o_t) * LOG2E
        b_acc, b_m, b_l = _softmax_row_step((b_acc, b_m, b_l), b_text_lse, b_text.to(tl.float32))
    else:
        Tk = used_keys(cache_seqlens, i_b, Tk)
        b_first, b_last = visible_keys(first_key, i_b, o_t, Tq, Tk, CAUSAL)
        # in a sliding window that is a small part of all keys
        lo = tl.min(b_first, 0) // BLOCK_N * BLOCK_N
        hi = tl.maximum(tl.max(b_last, 0) + 1, lo)
        n_splits = tl.num_programs(1)
        if image_k is not None:
            n_splits = tl.maximum(n_splits - 1, 1)
        split_keys = tl.cdiv(tl.cdiv(hi - lo, n_splits), BLOCK_N) * BLOCK_N
        lo += tl.program_id(1) * split_keys
        hi = tl.minimum(lo + split_keys, hi)
        b_acc, b_m, b_l = over_key_tiles(
            _softmax_step,
            (b_acc, b_m, b_l),
            None,
            row_pointers(q, strides.q, i_b, o_h, o_t) if BY_SLABS else b_q,
            None,
            k + i_b * strides.k[0] + i_h * strides.k[1],
            v + i_b * strides.v[0] + i_h * strides.v[1],
            strides.k[2],
            strides.v[2],
            first_key,
            b_first,
            b_last,
            lo,
            hi,
            Tk,
            scale_log2,
            softcap_log2,
            D,
            BLOCK_D,
            BLOCK_N,
            ALIGNED,
            INPUT_PRECISION,
        )

    # a row that saw nothing: out 0, lse -inf
    b_seen = b_l != 0.0  # NaN too
    b_l = tl.where(b_seen, b_l, 1.0)
    b_acc = b_acc / b_l[:, None]
    b_lse = tl.where(b_seen, (b_m + tl.log2(b_l)) * LN2, float("-inf"))
    p_o = row_pointers(out + i_s * stride_part, strides.out, i_b, o_h, o_t)
    m_o = m_row[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(columns(p_o, BLOCK_D, ALIGNED), b_acc.to(out.dtype.element_ty), mask=m_o)
    p_l = lse + ((i_s * (tl.num_programs(0) // n_tiles) + i_b * Hkv) * G + o_h) * Tq + o_t
    tl.store(p_l, b_lse, mask=m_row)


@kernel
def _merge_kernel(
    out_part,  # (splits, rows, D) float32
    lse_part,  # (splits, rows) float32
    out,
    lse,
    stride_o,  # (batch, head, position)
    Hq,
    Tq,
    n_rows,
    n_splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Joins the splits of one row, each weighted by 2^(its lse - the joint lse)."""
    i_r = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_lses = tl.load(lse_part + o_s * n_rows + i_r, mask=o_s < n_splits, other=float("-inf")) * LOG2E
    b_m = tl.maximum(tl.max(b_lses, 0), NO_SCORE)
    b_l = tl.sum(tl.exp2(b_lses - b_m), 0)
    b_seen = b_l != 0.0
    b_l = tl.where(b_seen, b_l, 1.0)
    b_acc = tl.zeros([BLOCK_D], tl.float32)
    o_part = i_r
    for _ in range(0, n_splits):
        b_weight = tl.exp2(tl.load(lse_part + o_part) * LOG2E - b_m)
        b_acc += b_weight * tl.load(out_part + o_part * D + o_d, mask=m_d, other=0.0)
        o_part += n_rows
    b_acc = b_acc / b_l
    i_b, i_h, i_t = i_r // (Hq * Tq), i_r // Tq % Hq, i_r % Tq
    p_o = out + i_b * stride_o[0] + i_h * stride_o[1] + i_t * stride_o[2]
    tl.store(p_o + o_d, b_acc.to(out.dtype.element_ty), mask=m_d)
    tl.store(lse + i_r, tl.where(b_seen, (b_m + tl.log2(b_l)) * LN2, float("-inf")))


def forward(
    inputs: Inputs, image_scores: Tensor | None = None, text: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Tq, D), laid out as q, and lse (B, Hq, Tq) float32; writes image_scores (B, Hq, Tq, K) float32.

    `text` is the out and lse of attention to only the text, if computed already: the images are joined to it, and no
    key is read.
    """
    text_out, text_lse = (None, None) if text is None else text
    if CHECK_INDEX:
        check_pool(inputs)
    out = empty_rows_like(inputs.q)
    inputs = kernel_inputs(inputs)
    q, k, v, image_k, image_v = inputs[:5]
    pooled = inputs.image_index is not None
    batch, q_heads, q_len, head_dim = q.shape
    _, kv_heads, k_len, _ = k.shape
    constants = kernel_constants(q, k, inputs.causal)
    block_g = constants["BLOCK_G"]
    decoding = q_len * block_g <= DECODE_ROWS
    tiles_of = "forward joined" if text else "decode" if decoding else "forward"
    tiles = choose_tiles(tiles_of, inputs)
    lse = q.new_empty((batch, q_heads, q_len), dtype=torch.float32)
    programs = cdiv(q_len * block_g, tiles.block_m) * batch * kv_heads
    splits = 1
    if text is None:
        splits = splits_of(programs, k_len, image_k is not None, multiprocessors(q.device), decoding)
    if splits == 1:
        out_part, lse_part = out, lse
        stride_part, stride_o = 0, strides(out)
    else:
        out_part = lse.new_empty(splits, *q.shape)
        lse_part = lse.new_empty(splits, *lse.shape)
        stride_part, stride_o = out_part.stride(0), out_part.stride()[1:4]
    with torch.cuda.device_of(q):
        launch(
            _forward_kernel,
            (programs, splits, 1),
            (
                *inputs.tensors,
                out_part,
                lse_part,
                image_scores,
                text_out,
                text_lse,
                ForwardStrides(
                    q=strides(q),
                    k=strides(k),
                    v=strides(v),
                    image_k=image_strides(image_k, pooled),
                    image_v=image_strides(image_v, pooled),
                    image_q=strides(inputs.image_q),
                    out=stride_o,
                ),
                stride_part,
                strides(text_out),
                kv_heads,
                q_len,
                k_len,
                num_images(inputs),
                inputs.scale * LOG2E.value,
                softcap_log2(inputs),
            ),
            {"BY_HEAD": inputs.by_head, **constants, **tiles.constants},
        )
        if splits > 1:
            rows = lse.numel()
            launch(
                _merge_kernel,
                (rows, 1, 1),
                (out_part, lse_part, out, lse, strides(out), q_heads, q_len, rows, splits),
                {
                    "D": head_dim,
                    "BLOCK_D": constants["BLOCK_D"],
                    "BLOCK_S": MAX_SPLITS,
                    "num_warps": 1,
                    "enable_fp_fusion": True,
                },
            )

    return out, lse
