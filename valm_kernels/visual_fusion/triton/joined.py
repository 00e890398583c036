"""impl="flash+triton": flash attention for the text (flash.py), to which Triton kernels join the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import flash
from ..checks import check_cu_seqlens
from ..inputs import Gradients, Inputs
from ..layout import empty_gradients, empty_rows_like, into
from . import backward as triton_backward
from . import forward as triton_forward
from .backward_pool import pool_gradients
from .backward_query import query_gradients
from .launch import aligned_rows, contiguous, kernel_inputs


def forward(inputs: Inputs, image_scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Tq, D), laid out as q, and lse (B, Hq, Tq) float32; writes image_scores (B, Hq, Tq, K) float32."""
    if triton_forward.CHECK_INDEX and inputs.cu_seqlens is not None:
        check_cu_seqlens(inputs.cu_seqlens, inputs.q.shape[0], inputs.k.shape[2], inputs.max_seqlen)
    q, inputs = inputs.q, kernel_inputs(inputs)
    text = flash.text_forward(inputs)
    if inputs.image_k is None:
        return into(empty_rows_like(q), text[0]), text[1]
    # out is laid out like the original q; first_key limits only the text
    return triton_forward.forward(inputs._replace(q=q, first_key=None), image_scores, text)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_image_scores: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    needed: Sequence[bool],
) -> Gradients:
    """The needed gradients, in the order of `Gradients`; out and lse come from `forward` for the same inputs."""
    # flash attention's backward takes no gradient of lse, and sums dq in any order
    if grad_lse is not None or torch.are_deterministic_algorithms_enabled():
        return triton_backward.backward(grad_out, grad_lse, grad_image_scores, out, lse, inputs, needed)
    gradients = empty_gradients(inputs, needed)
    inputs = kernel_inputs(inputs)
    grad_out, out = aligned_rows(grad_out), aligned_rows(out)
    grad_image_scores, lse = contiguous(grad_image_scores), lse.contiguous()
    text_dq = None
    with torch.cuda.device_of(inputs.q):
        if any(needed[:3]):
            text_dq, text_dk, text_dv = flash.text_backward(grad_out, out, lse, inputs)
            gradients = _with(gradients, k=text_dk, v=text_dv)
            if inputs.image_k is None:
                gradients = _with(gradients, q=text_dq)
        if inputs.image_k is not None:
            inputs = inputs._replace(first_key=None)
            results = query_gradients(inputs, out, lse, grad_out, None, grad_image_scores, gradients, text_dq)
            if results.image_dx is not None:
                pool_gradients(inputs, grad_out, results, gradients)
    return gradients


def _with(gradients: Gradients, **found: Tensor) -> Gradients:
    """`gradients` with the wanted gradients from `found`."""
    wanted = {name: (getattr(gradients, name), tensor) for name, tensor in found.items()}
    return gradients._replace(**{name: into(*pair) for name, pair in wanted.items() if pair[0] is not None})
