"""visual_fusion_attn as PyTorch operators: define, kernels, fake kernels and autograd formula.

The gradient of an input that is absent or needs none is an empty tensor here, and so are image_scores where nobody
asked for them; layout.py defines the layouts of the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from valm_kernels.visual_fusion import cpu
from valm_kernels.visual_fusion.inputs import Gradients, Inputs, check_cu_seqlens
from valm_kernels.visual_fusion.layout import empty_gradients, empty_image_scores, empty_rows_like

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? image_k, Tensor? image_v, Tensor? image_q, Tensor? image_index, "
    "Tensor? image_mask, Tensor? image_k_bias, Tensor? image_v_bias, Tensor? image_logit_bias, "
    "Tensor? image_score_bias, Tensor? first_key, Tensor? cache_seqlens, bool causal, float scale, float? softcap, "
    "str impl"
)
# Positions of the differentiable tensors among the inputs.
_DIFFERENTIABLE = tuple(Inputs._fields.index(name) for name in Gradients._fields)

_library = torch.library.Library("valm_kernels", "DEF")
_library.define(
    f"visual_fusion_attn({_INPUTS}, bool with_image_scores) -> (Tensor out, Tensor lse, Tensor image_scores)"
)
_library.define(
    "visual_fusion_attn_backward(Tensor grad_out, Tensor? grad_lse, Tensor? grad_image_scores, Tensor out, "
    f"Tensor lse, {_INPUTS}, bool[] needed) -> ({', '.join('Tensor' for _ in Gradients._fields)})"
)
_library.define("document_starts(Tensor cu_seqlens, SymInt num_queries, SymInt num_keys) -> Tensor")
_forward_op = torch.ops.valm_kernels.visual_fusion_attn.default
_backward_op = torch.ops.valm_kernels.visual_fusion_attn_backward.default


def fused_attention(inputs: Inputs, impl: str, with_image_scores: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and image_scores through the operator; impl is "cpu" or "triton".

    image_scores (B, Hq, Tq, K) are the t_ik of `visual_fusion_attn`, -inf where there is no image.
    """
    return _forward_op(*inputs, impl, with_image_scores)


def document_starts(cu_seqlens: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """first_key (1, Tq) int32 of the last `num_queries` tokens of a row of documents with the bounds `cu_seqlens`.

    An operator, so that a compiled graph checks the values too.

    Raises:
        ValueError: cu_seqlens is on the CPU and does not rise from 0 to num_keys.
    """
    return torch.ops.valm_kernels.document_starts(cu_seqlens, num_queries, num_keys)


def _implementation(impl: str) -> tuple[Any, Any]:
    """(forward, backward) of one implementation; Triton is imported only where it is used."""
    if impl == "cpu":
        return cpu.forward, cpu.backward
    from valm_kernels.visual_fusion.triton.backward import backward
    from valm_kernels.visual_fusion.triton.forward import forward

    return forward, backward


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, impl, with_image_scores = inputs
    checked = Inputs(*arguments)
    image_scores = empty_image_scores(checked, with_image_scores)
    out, lse = _implementation(impl)[0](checked, image_scores if with_image_scores else None)
    return out, lse, image_scores


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_image_scores: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *inputs: Any,
) -> tuple[Tensor, ...]:
    *arguments, impl, needed = inputs
    backward = _implementation(impl)[1]
    gradients = backward(grad_out, grad_lse, grad_image_scores, out, lse, Inputs(*arguments), needed)
    return _present(grad_out, gradients)


def _present(grad_out: Tensor, gradients: Gradients) -> tuple[Tensor, ...]:
    return tuple(grad_out.new_empty(0) if g is None else g for g in gradients)


def _forward_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, _, with_image_scores = inputs
    q = inputs[0]
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return empty_rows_like(q), lse, empty_image_scores(Inputs(*arguments), with_image_scores)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_image_scores: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *inputs: Any,
) -> tuple[Tensor, ...]:
    *arguments, _, needed = inputs
    return _present(grad_out, empty_gradients(Inputs(*arguments), needed))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    # Otherwise an unused lse would get a gradient of zeros, which costs time in the backward.
    ctx.set_materialize_grads(False)
    *tensors, ctx.causal, ctx.scale, ctx.softcap, ctx.impl, ctx.with_image_scores = inputs
    out, lse, _ = output
    ctx.save_for_backward(out, lse, *tensors)


def _autograd(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_image_scores: Tensor | None
) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    inputs = (*tensors, ctx.causal, ctx.scale, ctx.softcap, ctx.impl)
    if not ctx.with_image_scores:
        grad_image_scores = None  # of the empty tensor that stands for them
    if grad_out is None and grad_lse is None and grad_image_scores is None:
        return (None,) * (len(inputs) + 1)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    needed = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    gradients = _backward_op(grad_out, grad_lse, grad_image_scores, out, lse, *inputs, needed)
    of_input = dict(zip(_DIFFERENTIABLE, gradients, strict=True))
    return tuple(of_input.get(i) if ctx.needs_input_grad[i] else None for i in range(len(inputs) + 1))


def _document_starts(cu_seqlens: Tensor, num_queries: int, num_keys: int) -> Tensor:
    bounds = cu_seqlens.contiguous()
    token = torch.arange(num_keys - num_queries, num_keys, dtype=bounds.dtype, device=bounds.device)
    document = torch.searchsorted(bounds, token, right=True) - 1  # (Tq,)
    return bounds[document].int()[None]


def _checked_document_starts(cu_seqlens: Tensor, num_queries: int, num_keys: int) -> Tensor:
    check_cu_seqlens(cu_seqlens, num_keys)
    return _document_starts(cu_seqlens, num_queries, num_keys)


def _document_starts_fake(cu_seqlens: Tensor, num_queries: int, num_keys: int) -> Tensor:
    return cu_seqlens.new_empty((1, num_queries), dtype=torch.int32)


def _no_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        'visual_fusion_attn can be differentiated once only; for second derivatives use impl="reference"'
    )


for _device in ("CPU", "CUDA"):
    _library.impl("visual_fusion_attn", _forward, _device)
    _library.impl("visual_fusion_attn_backward", _backward, _device)
_library.impl("document_starts", _checked_document_starts, "CPU")
_library.impl("document_starts", _document_starts, "CompositeExplicitAutograd")
torch.library.register_fake("valm_kernels::document_starts", _document_starts_fake, lib=_library)
torch.library.register_fake("valm_kernels::visual_fusion_attn", _forward_fake, lib=_library)
torch.library.register_fake("valm_kernels::visual_fusion_attn_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "valm_kernels::visual_fusion_attn", _autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("valm_kernels::visual_fusion_attn_backward", _no_double_backward, lib=_library)
