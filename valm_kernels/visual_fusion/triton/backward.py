"""Backward of `visual_fusion_attn` in Triton, without atomics: every gradient is the same in every run.

With the joint lse, all weights are recomputed one tile at a time (FlashAttention-2, Dao 2023, algorithm 2). For a row:

    a_j  = exp(s_j - lse)     da_j = do.v_j                              ds_j = a_j (da_j - delta)
    b_k  = exp(t_k - lse)     db_k = do.(image_v_k + image_v_bias)       dt_k = b_k (db_k - delta)     dx_k = dt_k
    delta = do.out - dlse     (softmax backward; dlse_i enters every score of its row with weight a_j or b_k)

    dq = scale sum_j ds_j k_j            du = scale sum_k dx_k (image_k_k + image_k_bias)
    dk_j = scale sum_rows ds_j q        dv_j = sum_rows a_j do
    dimage_k_k = scale dx_k u           dimage_v_k = b_k do              (summed over the heads of a group)
    dimage_k_bias = scale sum dx_k u    dimage_v_bias = sum b_k do       dimage_logit_bias = sum dt_k

u is image_q, and du its gradient; without it u is q, and du is added to dq. With softcap c a score is c tanh(x / c) of
the product x, so ds_j and dx_k have the factor 1 - tanh² too; dt_k, the gradient before image_logit_bias, has not.

Three kernels, by what their programs own:
- query tiles (backward_query.py): dq, delta, one partial sum of each bias gradient per program, and of the
  images either their gradients (dense layout: an image belongs to one query) or dx and b (pooled layout);
- key tiles (backward_key.py): dk and dv;
- images of the pool (backward_pool.py): dimage_k and dimage_v from dx and b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from valm_kernels.visual_fusion.inputs import Inputs
from valm_kernels.visual_fusion.layout import empty_rows_like, empty_tokens_first, whole_rows
from valm_kernels.visual_fusion.triton.backward_key import key_gradients
from valm_kernels.visual_fusion.triton.backward_pool import pool_gradients
from valm_kernels.visual_fusion.triton.backward_query import query_gradients
from valm_kernels.visual_fusion.triton.launch import contiguous, kernel_inputs


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, inputs: Inputs
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, image_k, image_v, image_q and the three biases; None where absent.

    out and lse are what `forward` returned for the same inputs. The layouts are those of layout.py.
    """
    dq, dk, dv = (empty_tokens_first(x) for x in inputs[:3])
    dimage_k, dimage_v = (None if x is None else empty_rows_like(x) for x in (inputs.image_k, inputs.image_v))
    dimage_q = None if inputs.image_q is None else empty_tokens_first(inputs.image_q)
    inputs = kernel_inputs(inputs)
    q, k, image_index = inputs.q, inputs.k, inputs.image_index
    grad_out, out = whole_rows(grad_out), whole_rows(out)
    grad_lse, lse = contiguous(grad_lse), contiguous(lse)

    with torch.cuda.device_of(q):
        results = query_gradients(inputs, out, lse, grad_out, grad_lse, dq, dimage_k, dimage_v, dimage_q)
        if image_index is not None:
            image_q = q if inputs.image_q is None else inputs.image_q
            image_dx, image_b = results.image_dx, results.image_b
            pool_gradients(image_q, grad_out, image_dx, image_b, image_index, dimage_k, dimage_v, inputs.scale)
        key_gradients(inputs, lse, results.delta, grad_out, dk, dv)
    logit_partial = results.image_logit_bias
    if logit_partial is not None:
        # a group's rows are padded to a power of two
        logit_partial = logit_partial[..., : q.shape[1] // k.shape[1]]
    return (
        dq,
        dk,
        dv,
        dimage_k,
        dimage_v,
        dimage_q,
        _sum_of_programs(results.image_k_bias, inputs.image_k_bias),
        _sum_of_programs(results.image_v_bias, inputs.image_v_bias),
        _sum_of_programs(logit_partial, inputs.image_logit_bias),
    )


def _sum_of_programs(partial: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The gradient of `bias`, in its dtype, from partial sums with two more leading dimensions."""
    if partial is None or bias is None:
        return None
    return partial.sum((0, 1)).reshape(bias.shape).to(bias.dtype).contiguous()
