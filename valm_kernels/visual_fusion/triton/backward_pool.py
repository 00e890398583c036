"""Gradients of the image pool: a segmented reduction over the slots that name an image.

The maths is in backward.py. The slots (b, t, k) are sorted by image once; a program then owns one image of one
key-value head and sums dx u and b do over its slots in that order, so the result is the same in every run.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from valm_kernels.visual_fusion.inputs import Gradients, Inputs
from valm_kernels.visual_fusion.layout import empty_rows_like
from valm_kernels.visual_fusion.triton.backward_query import ForPool
from valm_kernels.visual_fusion.triton.launch import strides
from valm_kernels.visual_fusion.triton.primitives import kernel, row_pointers
from valm_kernels.visual_fusion.triton.tiles import block_d

# Slots per step of a program, and the columns of a row that one of its warps sums: at least two warps. Chosen by the
# registers that the compiler reports, not yet measured on a card.
SLOTS = 16
COLUMNS_PER_WARP = 64


@kernel
def _pool_kernel(
    image_q,
    grad_out,
    image_dx,  # (B, Hq, K, Tq)
    image_b,
    order,  # slots (b, t, k), flattened, sorted by image
    segment,  # (U + 1): where the slots of an image begin in `order`
    dimage_k,
    dimage_v,
    stride_iq,  # (batch, head, position)
    stride_do,
    stride_dik,  # (head, image)
    stride_div,
    Hkv,
    Tq,
    K,
    scale,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i_u = (tl.program_id(0) // Hkv).to(tl.int64)
    i_h = (tl.program_id(0) % Hkv).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin = tl.load(segment + i_u)
    end = tl.load(segment + i_u + 1)
    b_dk = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for i_e in range(begin, end, BLOCK_E):
        o_e = i_e + tl.arange(0, BLOCK_E)
        m_e = o_e < end
        m_ed = m_e[:, None] & m_d[None, :]
        o_slot = tl.load(order + o_e, mask=m_e, other=0)
        o_b, o_t, o_k = o_slot // (Tq * K), o_slot // K % Tq, o_slot % K
        for i_g in range(0, G):
            i_hq = i_h * G + i_g
            o_coefficient = ((o_b * Hkv * G + i_hq) * K + o_k) * Tq + o_t
            # [BE]
            b_dx = tl.load(image_dx + o_coefficient, mask=m_e, other=0.0)
            b_b = tl.load(image_b + o_coefficient, mask=m_e, other=0.0)
            # [BE, BD]
            p_u = row_pointers(image_q, stride_iq, o_b, i_hq, o_t)
            p_do = row_pointers(grad_out, stride_do, o_b, i_hq, o_t)
            b_u = tl.load(p_u[:, None] + o_d[None, :], mask=m_ed, other=0.0).to(tl.float32)
            b_do = tl.load(p_do[:, None] + o_d[None, :], mask=m_ed, other=0.0).to(tl.float32)
            b_dk += b_dx[:, None] * b_u
            b_dv += b_b[:, None] * b_do
    p_dik = dimage_k + i_h * stride_dik[0] + i_u * stride_dik[1] + o_d
    p_div = dimage_v + i_h * stride_div[0] + i_u * stride_div[1] + o_d
    tl.store(p_dik, (tl.sum(b_dk, 0) * scale).to(dimage_k.dtype.element_ty), mask=m_d)
    tl.store(p_div, tl.sum(b_dv, 0).to(dimage_v.dtype.element_ty), mask=m_d)


def pool_gradients(inputs: Inputs, grad_out: Tensor, for_pool: ForPool, gradients: Gradients) -> None:
    """Fills the gradients of image_k and image_v (Hkv, U, D); inputs are those of `kernel_inputs`."""
    image_k, image_v, image_index = inputs.image_k, inputs.image_v, inputs.image_index
    assert image_k is not None and image_v is not None and image_index is not None
    image_q = inputs.q if inputs.image_q is None else inputs.image_q
    # one without the other is hardly less work
    dimage_k, dimage_v = (
        empty_rows_like(x) if g is None else g for x, g in ((image_k, gradients.image_k), (image_v, gradients.image_v))
    )
    kv_heads, pool_size, head_dim = dimage_k.shape
    image, order = torch.sort(image_index.flatten(), stable=True)
    # slots without an image are -1: they come first, before the segment of image 0
    segment = torch.searchsorted(image, torch.arange(pool_size + 1, dtype=image.dtype, device=image.device))
    _pool_kernel[(pool_size * kv_heads,)](
        image_q,
        grad_out,
        for_pool.image_dx,
        for_pool.image_b,
        order,
        segment,
        dimage_k,
        dimage_v,
        strides(image_q),
        strides(grad_out),
        dimage_k.stride()[:2],
        dimage_v.stride()[:2],
        kv_heads,
        image_q.shape[2],
        image_index.shape[2],
        inputs.scale,
        D=head_dim,
        G=image_q.shape[1] // kv_heads,
        BLOCK_D=block_d(head_dim),
        BLOCK_E=SLOTS,
        num_warps=max(2, block_d(head_dim) // COLUMNS_PER_WARP),
        enable_fp_fusion=True,
    )
