"""Common code of the Triton kernels: the rows of a program, the keys and images that a row may see, the loop over keys.

A program owns BLOCK_M rows. A row is one query of one head. The heads of a group (grouped-query attention) are
neighbouring rows, so that a key or value tile is loaded once for the group:

    row r  ->  position r / BLOCK_G,   head i_h * G + r % BLOCK_G

BLOCK_G is the group size G rounded up to a power of two. If it is larger than BLOCK_M, a tile holds a part of one
position's heads. Rows past the last position or head repeat the last row, so loads need no mask. They are masked only
in stores and sums.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# exp2 and log2 are single instructions; scores are kept in units of log 2
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Stages of the loop over a row's images. With two stages Triton copies the next step's data after the work on this
# step, and waits for it at once. Only a third stage lets copies and work overlap.
IMAGE_STAGES = tl.constexpr(3)

# Columns of the slabs in which `products` reads rows.
SLAB = tl.constexpr(32)


def kernel(function: Callable) -> Any:
    """`triton.jit` for a kernel that is compiled once for all values of its arguments, except strides.

    By default Triton compiles again if an integer becomes 1 or a multiple of 16, or if a pointer's alignment changes.
    During generation the number of keys takes every value: each new variant would stall for seconds and break a CUDA
    graph. Loads state the alignment that they need (`columns`).

    This does not reach into tuples, so sizes and the caller's tensors are separate parameters. Strides are in tuples,
    because they hardly change (a cache that grows by torch.cat makes a second variant if D is 72). Tensors allocated
    for the kernel are in tuples too, because their addresses are always aligned.
    """
    parameters = inspect.signature(function).parameters.values()
    runtime = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
    return triton.jit(function, do_not_specialize=runtime)


@triton.jit
def tile_rows(i_r, i_h, Tq, G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Position and head (int64 [BM]) of the rows from row i_r on, and whether each row exists."""
    o_r = i_r + tl.arange(0, BLOCK_M)
    o_t = o_r // BLOCK_G
    o_g = o_r % BLOCK_G
    m_row = (o_t < Tq) & (o_g < G)
    o_t = tl.minimum(o_t, Tq - 1).to(tl.int64)
    o_h = i_h * G + tl.minimum(o_g, G - 1)
    return o_t, o_h, m_row


@triton.jit
def row_pointers(x, stride, i_b, o_h, o_t):
    """Pointers to the rows of x; stride is (batch, head, position, ...)."""
    return x + i_b * stride[0] + o_h * stride[1] + o_t * stride[2]


@triton.jit
def columns(p_row, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the elements [BM, BD] of rows that begin at p_row [BM].

    Without ALIGNED the compiler may load element by element, because it cannot see that rows are contiguous and
    aligned: after loop bounds that were loaded, or if D is not a multiple of 16.
    """
    p = p_row[:, None] + tl.arange(0, BLOCK_D)[None, :]
    if ALIGNED:
        p = tl.max_contiguous(tl.multiple_of(p, [1, 16]), [1, 16])
    return p


@triton.jit
def load_rows(x, stride, i_b, o_h, o_t, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr):
    """Rows of x, [BM, BD]."""
    p_row = row_pointers(x, stride, i_b, o_h, o_t)
    return tl.load(columns(p_row, BLOCK_D, ALIGNED), mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)


@triton.jit
def used_keys(cache_seqlens, i_b, Tk):
    """The number of keys of the batch row."""
    if cache_seqlens is not None:
        Tk = tl.minimum(tl.maximum(tl.load(cache_seqlens + i_b), 0), Tk)
    return Tk


@triton.jit
def visible_keys(first_key, i_b, o_t, Tq, Tk, CAUSAL: tl.constexpr):
    """First and last key, both inclusive, that each row may see ([BM] each). If first > last, it sees nothing."""
    if CAUSAL:
        b_last = o_t.to(tl.int32) + (Tk - Tq)
    else:
        b_last = tl.full(o_t.shape, Tk - 1, tl.int32)
    if first_key is not None:
        b_first = tl.minimum(tl.maximum(tl.load(first_key + i_b * Tq + o_t), 0), Tk).to(tl.int32)
    else:
        b_first = tl.zeros(o_t.shape, tl.int32)
    return b_first, b_last


@triton.jit
def key_tile_range(b_first, b_last, lo, hi, BLOCK_N: tl.constexpr):
    """The key tiles, within keys lo..hi (lo on a tile border), that a set of rows needs.

    Returns begin <= full_begin <= full_end <= end. In [full_begin, full_end) all rows see every key. In the tiles of
    [begin, full_begin) and [full_end, end) some row sees only a part. Every bound except `end` is on a tile border.
    """
    begin = tl.maximum(tl.min(b_first, 0), lo)
    begin = begin // BLOCK_N * BLOCK_N
    end = tl.maximum(tl.minimum(tl.max(b_last, 0) + 1, hi), begin)
    full_begin = tl.cdiv(tl.maximum(tl.max(b_first, 0), begin), BLOCK_N) * BLOCK_N
    full_begin = tl.minimum(full_begin, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    full_end = tl.minimum(tl.min(b_last, 0) + 1, hi) // BLOCK_N * BLOCK_N
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def tanh(x):
    """tanh, exact to a few units in the last place, unlike the hardware's approximation."""
    # a rational function of exp loses the digits of a small x; its series (Cephes, tanhf) has them
    x2 = x * x
    series = (((-5.70498872745e-3 * x2 + 2.06390887954e-2) * x2 - 5.37397155531e-2) * x2 + 1.33314422036e-1) * x2
    small = (series - 3.33332819422e-1) * x2 * x + x
    # exp2 is inf for a large x, and 0 for a small one: 1 and -1
    large = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, large)


@triton.jit
def capped(b_s, softcap_log2):
    """Capped scores; scores and cap are in units of log 2."""
    if softcap_log2 is not None:
        b_s = tanh(b_s / softcap_log2) * softcap_log2
    return b_s


@triton.jit
def cap_slope(b_s, softcap_log2):
    """The derivative of capped scores, 1 - tanh²; 0 if a key is not seen (b_s is -inf)."""
    b_tanh = b_s / softcap_log2
    return 1.0 - tl.minimum(b_tanh * b_tanh, 1.0)


@triton.jit
def products(
    a,
    b,
    m_a,
    m_b,
    i_step,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The product of each row of a with each row of b, [BM, BN], in step i_step >= 0 of a loop over b.

    a and b are tiles, [BM, BD] and [BN, BD], or pointers to rows, [BM] and [BN], which are read SLAB columns at a time.
    m_a and m_b flag the rows that exist (None: all). Slabs are for large D: each warp holds its rows of a tile a in
    registers for the whole loop, and 256 columns of float32 take all registers.
    """
    if len(a.shape) == 2:
        b_s = tl.dot(a, tl.trans(b), input_precision=INPUT_PRECISION)
    else:
        # this is 0, but the compiler does not know it and so does not read all of a before the loop
        zero = tl.minimum(i_step, 0)
        b_s = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
        for i_d in tl.static_range(0, D, SLAB):
            m_d = (i_d + tl.arange(0, SLAB) < D)[None, :]
            m_ad = m_d if m_a is None else m_d & m_a[:, None]
            m_bd = m_d if m_b is None else m_d & m_b[:, None]
            b_a = tl.load(columns(a + (i_d + zero), SLAB, ALIGNED), mask=m_ad, other=0.0)
            b_b = tl.load(columns(b + i_d, SLAB, ALIGNED), mask=m_bd, other=0.0)
            b_s = tl.dot(b_a, tl.trans(b_b), b_s, input_precision=INPUT_PRECISION)
    return b_s


@triton.jit
def over_key_tiles(
    step: tl.constexpr,  # (carry, row_values, b_s, b_dp, b_k, b_v, INPUT_PRECISION) -> carry
    carry,
    row_values,
    q,  # rows for `products`
    do,  # rows for `products`, or None
    p_k,  # the first key and value of the batch row and head
    p_v,
    stride_kn,
    stride_vn,
    first_key,
    b_first,
    b_last,
    lo,
    hi,
    Tk,
    scale_log2,
    softcap_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Calls `step` on every key tile within keys lo..hi that the rows see, with its scores b_s and its products b_dp of
    do and the values, [BM, BN] each.

    Scores are in units of log 2, and -inf if the row does not see the key.
    """
    BY_SLABS: tl.constexpr = len(q.shape) == 1
    begin, full_begin, full_end, end = key_tile_range(b_first, b_last, lo, hi, BLOCK_N)
    m_d = tl.arange(0, BLOCK_D) < D
    # A mask adds two comparisons and a selection to each score's exponential and sum, so tiles that all rows see whole
    # are not masked. Without first_key every row sees the keys from lo on, and only the end needs a mask.
    for i_part in tl.static_range(0 if first_key is not None else 1, 3):
        part_begin = begin if i_part == 0 else (full_begin if i_part == 1 else full_end)
        part_end = tl.minimum(full_begin, end) if i_part == 0 else (full_end if i_part == 1 else end)
        for i_n in range(part_begin, part_end, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N)
            m_n = m_d[None, :]
            if i_part != 1:
                m_n = m_n & (o_n < Tk)[:, None]
            o_row = o_n.to(tl.int64)
            p_kn, p_vn = p_k + o_row * stride_kn, p_v + o_row * stride_vn
            # [BN, BD]
            b_k = tl.load(columns(p_kn, BLOCK_D, ALIGNED), mask=m_n, other=0.0)
            b_v = tl.load(columns(p_vn, BLOCK_D, ALIGNED), mask=m_n, other=0.0)
            m_key = None if i_part == 1 else o_n < Tk
            # [BM, BN]
            keys = p_kn if BY_SLABS else b_k
            b_s = products(q, keys, None, m_key, i_n, D, BLOCK_D, ALIGNED, INPUT_PRECISION) * scale_log2
            b_s = capped(b_s, softcap_log2)
            if i_part != 1:
                m_seen = (o_n[None, :] >= b_first[:, None]) & (o_n[None, :] <= b_last[:, None])
                b_s = tl.where(m_seen, b_s, float("-inf"))
            b_dp = None
            if do is not None:
                values = p_vn if BY_SLABS else b_v
                b_dp = products(do, values, None, m_key, i_n, D, BLOCK_D, ALIGNED, INPUT_PRECISION)
            carry = step(carry, row_values, b_s, b_dp, b_k, b_v, INPUT_PRECISION)
    return carry


@triton.jit
def image_slots(image_index, image_mask, i_b, i_h, o_t, i_k, Hkv, Tq, K, BY_HEAD: tl.constexpr):
    """Slot of the i_k-th image of each row in the image tensor (int64 [BM]) and whether there is an image ([BM]).

    With image_index the image tensor is a pool, and the slot is the index into the pool. Otherwise the slot is i_k.
    """
    o_ik = (i_b * Tq + o_t) * K + i_k
    if image_index is not None:
        if BY_HEAD:
            o_ik = ((i_b * Hkv + i_h) * Tq + o_t) * K + i_k
        o_slot = tl.load(image_index + o_ik).to(tl.int64)
        m_image = o_slot >= 0
    else:
        o_slot = tl.zeros(o_t.shape, tl.int64) + i_k
        m_image = o_slot >= 0
        if image_mask is not None:
            m_image = tl.load(image_mask + o_ik) != 0
    return o_slot, m_image


@triton.jit
def load_images(
    image, stride, i_b, i_h, o_t, o_slot, m_image, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr
):
    """One image of each row, float32 [BM, BD]; zeros if there is no image."""
    p_image = row_pointers(image, stride, i_b, i_h, o_t) + o_slot * stride[3]
    m_image = m_image[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(columns(p_image, BLOCK_D, ALIGNED), mask=m_image, other=0.0).to(tl.float32)


@triton.jit
def load_bias(bias, i_h, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr):
    """The bias of head i_h, float32 [BD]."""
    o_d = tl.arange(0, BLOCK_D)
    p_bias = bias + i_h * D + o_d
    if ALIGNED:
        p_bias = tl.max_contiguous(tl.multiple_of(p_bias, 16), 16)
    return tl.load(p_bias, mask=o_d < D, other=0.0).to(tl.float32)


@triton.jit
def image_score_terms(
    b_u,
    image_k_bias,
    image_logit_bias,
    i_h,
    o_h,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The terms that all image scores of a row share, u.image_k_bias and image_logit_bias, in units of log 2 ([BM])."""
    b_product = tl.zeros(o_h.shape, tl.float32)
    b_logit = tl.zeros(o_h.shape, tl.float32)
    if image_k_bias is not None:
        b_product = tl.sum(b_u * load_bias(image_k_bias, i_h, D, BLOCK_D, ALIGNED)[None, :], 1) * scale_log2
    if image_logit_bias is not None:
        b_logit = tl.load(image_logit_bias + o_h).to(tl.float32) * LOG2E
    return b_product, b_logit


@triton.jit
def load_score_bias(image_score_bias, i_b, o_t, i_k, Tq, K):
    """image_score_bias of the i_k-th image of each row, in units of log 2 ([BM])."""
    return tl.load(image_score_bias + (i_b * Tq + o_t) * K + i_k) * LOG2E


@triton.jit
def load_lse(lse, o_row, m_row):
    """lse of rows in units of log 2; +inf if a row sees nothing or does not exist, so that its weights become 0."""
    b_lse = tl.load(lse + o_row, mask=m_row, other=float("-inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
