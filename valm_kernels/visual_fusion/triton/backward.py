"""Backward of `visual_fusion_attn` in Triton, without atomics: gradients are bit for bit equal in every run.

With the joint lse, all weights are recomputed one tile at a time (FlashAttention-2, Dao 2023, algorithm 2). For a row:

    a_j  = exp(s_j - lse)     da_j = do.v_j                              ds_j = a_j (da_j - delta)
    b_k  = exp(t_k - lse)     db_k = do.(image_v_k + image_v_bias)       dt_k = b_k (db_k - delta)     dx_k = dt_k
    delta = do.out - dlse     (softmax backward; dlse_i enters every score of its row with weight a_j or b_k)

    dq = scale sum_j ds_j k_j            du = scale sum_k dx_k (image_k_k + image_k_bias)
    dk_j = scale sum_rows ds_j q        dv_j = sum_rows a_j do
    dimage_k_k = scale dx_k u           dimage_v_k = b_k do              (summed over the heads of a group)
    dimage_k_bias = scale sum dx_k u    dimage_v_bias = sum b_k do       dimage_logit_bias = sum dt_k
    dimage_score_bias_k = dt_k summed over all heads

u is image_q, and du its gradient. Without image_q, u is q and du is added to dq. With softcap c a score is
c tanh(x / c) of the product x, so ds_j and dx_k get the factor 1 - tanh², but not dt_k, the gradient after the score
biases. The gradient of the image scores t_k themselves (return_image_weights) is added to dt_k.

Three steps, by what a program owns:
- a query tile (backward_query.py): dq, delta, partial sums of the bias gradients, and for the images either their
  gradients (dense layout: an image belongs to one query) or dx and b (pooled layout). backward_bias.py adds the partial
  sums;
- a key tile (backward_key.py): dk and dv. Under first_key a small kernel first finds the queries of each key tile;
- an image of the pool (backward_pool.py): dimage_k and dimage_v from dx and b, popular images in parts first.
In joined.py flash attention replaces the second step: it computes dk, dv and the text's part of dq. Its dq may differ
in the last bits from run to run, so these kernels replace it under torch.use_deterministic_algorithms(True).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..inputs import Gradients, Inputs
from ..layout import empty_gradients
from .backward_key import key_gradients
from .backward_pool import pool_gradients
from .backward_query import query_gradients
from .launch import aligned_rows, contiguous, kernel_inputs


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_image_scores: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    needed: Sequence[bool],
) -> Gradients:
    """The needed gradients, in the order of `Gradients`. No kernel is launched only for others.

    out and lse come from `forward` for the same inputs.
    """
    gradients = empty_gradients(inputs, needed)
    inputs = kernel_inputs(inputs)
    grad_out, out = aligned_rows(grad_out), aligned_rows(out)
    grad_lse, grad_image_scores, lse = contiguous(grad_lse), contiguous(grad_image_scores), lse.contiguous()
    with torch.cuda.device_of(inputs.q):
        results = query_gradients(inputs, out, lse, grad_out, grad_lse, grad_image_scores, gradients)
        if results.image_dx is not None:
            pool_gradients(inputs, grad_out, results, gradients)
        if gradients.k is not None or gradients.v is not None:
            key_gradients(inputs, lse, results.delta, grad_out, gradients)
    return gradients
