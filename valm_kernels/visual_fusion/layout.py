"""Memory layouts of the outputs: the fake kernels declare them, and every implementation follows them.

out and the gradients of the images are `empty_rows_like` their input, the gradients of q, k, v and image_q are
`empty_tokens_first`, everything else is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from valm_kernels.visual_fusion.inputs import Gradients, Inputs, num_images


def empty_tokens_first(like: Tensor) -> Tensor:
    """An uninitialised (B, H, T, D) tensor whose memory is (B, T, H, D), as a projection's backward reads it."""
    batch, heads, tokens, dim = like.shape
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def empty_rows_like(like: Tensor) -> Tensor:
    """An uninitialised tensor laid out like `like`, or contiguous where the last dimension of `like` is strided."""
    whole_rows = like.stride(-1) == 1
    return torch.empty_like(like, memory_format=torch.preserve_format if whole_rows else torch.contiguous_format)


_GRADIENT_LIKE = {
    "q": empty_tokens_first,
    "k": empty_tokens_first,
    "v": empty_tokens_first,
    "image_k": empty_rows_like,
    "image_v": empty_rows_like,
    "image_q": empty_tokens_first,
}


def empty_gradients(inputs: Inputs, needed: Sequence[bool]) -> Gradients:
    """Uninitialised gradients of the inputs that are present and needed, in the order of `Gradients`."""
    gradients: list[Tensor | None] = []
    for name, is_needed in zip(Gradients._fields, needed, strict=True):
        tensor = getattr(inputs, name)
        if tensor is None or not is_needed:
            gradients.append(None)
        else:
            like = _GRADIENT_LIKE.get(name)
            gradients.append(tensor.new_empty(tensor.shape) if like is None else like(tensor))
    return Gradients._make(gradients)


def empty_image_scores(inputs: Inputs, wanted: bool) -> Tensor:
    """Uninitialised (B, Hq, Tq, K), in the precision of lse; (0,) if nobody wants them."""
    q = inputs.q
    if not wanted:
        return q.new_empty(0)
    shape = (*q.shape[:3], num_images(inputs))
    return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def whole_rows(tensor: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy where its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
