"""visual_fusion_attn as PyTorch operators: define, kernels, fake kernels and autograd formula.

The gradient of an input that is absent or needs none is an empty tensor here, as are image_scores that nobody asked
for: vmap calls no operator that returns a list. layout.py defines the layouts of the other tensors.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._ops import add_op_namespace_prefix, ops
from ..native import survives_fork
from . import cpu, flash
from .autocast import outside_autocast
from .checks import check_cu_seqlens
from .inputs import TENSOR_NAMES, TYPES, Gradients, Inputs, num_images
from .layout import empty_gradients, empty_image_scores, empty_rows_like

# The type in the operators' schema for each type of a field of `Inputs`.
_SCHEMA_TYPES: dict[Any, str] = {
    **{Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool"},
    **{float: "float", float | None: "float?", int | None: "SymInt?"},
}
_INPUTS = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in TYPES.items()) + ", str impl"
# Positions of the differentiable tensors among the inputs.
_DIFFERENTIABLE = tuple(Inputs._fields.index(name) for name in Gradients._fields)

_library = torch.library.Library(ops.name, "DEF")
_library.define(
    f"visual_fusion_attn({_INPUTS}, bool with_image_scores) -> (Tensor out, Tensor lse, Tensor image_scores)"
)
_library.define(
    "visual_fusion_attn_backward(Tensor grad_out, Tensor? grad_lse, Tensor? grad_image_scores, Tensor out, "
    f"Tensor lse, {_INPUTS}, bool[] needed) -> ({', '.join('Tensor' for _ in Gradients._fields)})"
)
_library.define(
    "document_starts(Tensor cu_seqlens, SymInt batch, SymInt num_queries, SymInt num_keys, SymInt? max_seqlen) -> "
    "Tensor"
)
_forward_op = ops.visual_fusion_attn.default
_backward_op = ops.visual_fusion_attn_backward.default


def fused_attention(inputs: Inputs, impl: str, with_image_scores: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and image_scores through the operator; impl is "cpu", "triton" or "flash+triton".

    image_scores (B, Hq, Tq, K) are the t_ik of `visual_fusion_attn`, -inf where there is no image.
    """
    return _forward_op(*inputs, impl, with_image_scores)


def document_starts(cu_seqlens: Tensor, batch: int, num_queries: int, num_keys: int, max_seqlen: int | None) -> Tensor:
    """first_key (B, Tq) int32 for the last `num_queries` tokens of each row of documents with the bounds `cu_seqlens`.

    It is an operator so that a compiled graph checks the values too.

    Raises:
        ValueError: cu_seqlens is on the CPU and fails `check_cu_seqlens`.
    """
    return ops.document_starts(cu_seqlens, batch, num_queries, num_keys, max_seqlen)


def _implementation(impl: str) -> tuple[Any, Any]:
    """(forward, backward) of one implementation."""
    return (cpu.forward, cpu.backward) if impl == "cpu" else _triton(impl == flash.NAME)


@cache
def _triton(with_flash: bool) -> tuple[Any, Any]:
    """(forward, backward) in Triton, which is imported only when it is used."""
    from .triton import backward, forward, joined

    return (joined.forward, joined.backward) if with_flash else (forward.forward, backward.backward)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, impl, with_image_scores = inputs
    given = Inputs(*inputs[:-2])
    image_scores = empty_image_scores(given, with_image_scores)
    out, lse = _implementation(impl)[0](_read(given), image_scores if with_image_scores else None)
    return out, lse, image_scores


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_image_scores: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *inputs: Any,
) -> tuple[Tensor, ...]:
    *_, impl, needed = inputs
    given, backward = Inputs(*inputs[:-2]), _implementation(impl)[1]
    read = _read(given)
    with outside_autocast(grad_out.device.type):
        gradients = backward(grad_out, grad_lse, grad_image_scores, out, lse, read, needed)
    if read is not given:
        of_images = (None if g is None else g.zero_() for g in empty_gradients(given, needed)[3:])
        gradients = Gradients(*gradients[:3], *of_images)
    return _present(grad_out, gradients)


def _read(given: Inputs) -> Inputs:
    """The inputs that an implementation reads: without images if K is 0."""
    return given if given.image_k is None or num_images(given) else given.without_images()


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


class _Attention(torch.autograd.Function):
    """The operator as a node of the autograd graph, which takes only the differentiable inputs."""

    @staticmethod
    def forward(
        ctx: Any, keyset: Any, inputs: tuple[Any, ...], *differentiable: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Otherwise an unused lse would get a gradient of zeros, which costs time in the backward.
        ctx.set_materialize_grads(False)
        out, lse, image_scores = _below_autograd(_forward_op, keyset, inputs)
        tensors = inputs[: len(TENSOR_NAMES)]
        *ctx.options, ctx.with_image_scores = inputs[len(TENSOR_NAMES) :]  # the last of the options is impl
        ctx.save_for_backward(out, lse, *tensors)
        return out, lse, image_scores

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_image_scores: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        if not ctx.with_image_scores:
            grad_image_scores = None  # image_scores is an empty tensor
        needed = ctx.needs_input_grad[2:]
        if grad_out is None:
            if grad_lse is None and grad_image_scores is None:
                return (None,) * (2 + len(needed))
            grad_out = torch.zeros_like(out)
        inputs = (*tensors, *ctx.options, needed)
        gradients = _backward_op(grad_out, grad_lse, grad_image_scores, out, lse, *inputs)
        return None, None, *(g if is_needed else None for g, is_needed in zip(gradients, needed, strict=True))


class _Gradients(torch.autograd.Function):
    """The backward operator as a node that raises when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, inputs: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return _below_autograd(_backward_op, keyset, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            'visual_fusion_attn can be differentiated only once; for second derivatives use impl="reference"'
        )


def _below_autograd(op: Any, keyset: Any, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What the dispatcher does after autograd."""
    keyset = keyset & torch._C._after_autograd_keyset
    with torch._C._AutoDispatchBelowAutograd():
        if not torch._C._are_functorch_transforms_active():
            return op.redispatch(keyset, *inputs)
        # a Function turns both modes off, but an outer transform may record
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return op.redispatch(keyset, *inputs)


def _records_gradients(inputs: tuple[Any, ...]) -> bool:
    """Whether a gradient of the inputs may be asked for.

    Raises:
        NotImplementedError: a tangent is asked for.
    """
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    # outside a level no tensor has a tangent, and to ask each of them takes as long as a launch
    within_level = forward_ad._current_level >= 0
    if within_level and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "visual_fusion_attn has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
            'torch.autograd.forward_ad); use impl="reference", or torch.func.jacrev for first derivatives'
        )
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _apply(function: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """function.apply, also inside transforms of torch.func: the dispatcher comes here once for each transform, as for
    PyTorch's own operators."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    from torch._functorch.utils import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return _in_transform(function).apply(*arguments)


@cache
def _in_transform(function: Any) -> Any:
    """The node for one transform of torch.func, in which a torch.autograd.Function would need its own rules."""
    from torch.autograd.function import _SingleLevelFunction

    methods = {"forward": staticmethod(function.forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (_SingleLevelFunction,), methods)


# Every call uses four private names of PyTorch, and transforms of torch.func use three more. The public ways fail in
# PyTorch 2.13. With torch.library.register_autograd, torch.func.grad raises, forward mode returns zeros, and a call
# with gradients takes 100 µs more to read the schema. An autograd.Function around the operator is not traced by
# torch.compile if it has a jvp, is not functionalised, and leaves exported programs without torch.func.
def _autograd(keyset: Any, *inputs: Any) -> tuple[Tensor, ...]:
    if _records_gradients(inputs):
        return _apply(_Attention, keyset, inputs, *(inputs[i] for i in _DIFFERENTIABLE))
    return _below_autograd(_forward_op, keyset, inputs)


def _backward_autograd(keyset: Any, *inputs: Any) -> tuple[Tensor, ...]:
    if _records_gradients(inputs):
        return _apply(_Gradients, keyset, inputs, *(x for x in inputs if isinstance(x, Tensor)))
    return _below_autograd(_backward_op, keyset, inputs)


def _document_starts(cu_seqlens: Tensor, batch: int, num_queries: int, num_keys: int, max_seqlen: int | None) -> Tensor:
    bounds = cu_seqlens.contiguous()
    dtype, device = bounds.dtype, bounds.device
    row_start = num_keys * torch.arange(batch, dtype=dtype, device=device)[:, None]  # (B, 1)
    token = row_start + torch.arange(num_keys - num_queries, num_keys, dtype=dtype, device=device)  # (B, Tq)
    document = torch.searchsorted(bounds, token, right=True) - 1
    return (bounds[document] - row_start).int()


@survives_fork
def _checked_document_starts(
    cu_seqlens: Tensor, batch: int, num_queries: int, num_keys: int, max_seqlen: int | None
) -> Tensor:
    check_cu_seqlens(cu_seqlens, batch, num_keys, max_seqlen)
    return _document_starts(cu_seqlens, batch, num_queries, num_keys, max_seqlen)


def _document_starts_fake(
    cu_seqlens: Tensor, batch: int, num_queries: int, num_keys: int, max_seqlen: int | None
) -> Tensor:
    return cu_seqlens.new_empty((batch, num_queries), dtype=torch.int32)


for _device in ("CPU", "CUDA"):
    _library.impl("visual_fusion_attn", _forward, _device)
    _library.impl("visual_fusion_attn_backward", _backward, _device)
_library.impl("document_starts", _checked_document_starts, "CPU")
_library.impl("document_starts", _document_starts, "CompositeExplicitAutograd")
torch.library.register_fake(add_op_namespace_prefix("document_starts"), _document_starts_fake, lib=_library)
torch.library.register_fake(add_op_namespace_prefix("visual_fusion_attn"), _forward_fake, lib=_library)
torch.library.register_fake(add_op_namespace_prefix("visual_fusion_attn_backward"), _backward_fake, lib=_library)
_library.impl("visual_fusion_attn", _autograd, "Autograd", with_keyset=True)
_library.impl("visual_fusion_attn_backward", _backward_autograd, "Autograd", with_keyset=True)
