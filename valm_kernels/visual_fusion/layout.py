"""Memory layouts of the outputs: the fake kernels declare them, and every implementation follows them.

out and the gradients of the images are `empty_rows_like` their input, the gradients of q, k, v and image_q are
`empty_tokens_first`, everything else is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .inputs import Gradients, Inputs, num_images


def empty_tokens_first(like: Tensor) -> Tensor:
    """An uninitialised (B, H, T, D) tensor whose memory is (B, T, H, D), as a projection's backward reads it."""
    _, heads, tokens, dim = like.shape
    return like.new_empty_strided(like.shape, (tokens * heads * dim, dim, heads * dim, 1))


def empty_rows_like(like: Tensor) -> Tensor:
    """An uninitialised tensor laid out like `like`. It is contiguous if the last dimension of `like` is strided or its
    rows overlap (`Tensor.unfold`)."""
    empty = torch.empty_like(like)
    return empty if like.stride(-1) == empty.stride(-1) == 1 else like.new_empty(like.shape)


def into(result: Tensor, found: Tensor) -> Tensor:
    """`found` in the layout of `result`, without a copy if it has that layout."""
    return found if found.stride() == result.stride() else result.copy_(found)


def _empty_contiguous(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


# In the order of `Gradients`.
_GRADIENT_LIKE = (
    *(empty_tokens_first, empty_tokens_first, empty_tokens_first),
    *(empty_rows_like, empty_rows_like, empty_tokens_first),
    *(_empty_contiguous, _empty_contiguous, _empty_contiguous, _empty_contiguous),
)


def empty_gradients(inputs: Inputs, needed: Sequence[bool]) -> Gradients:
    """Uninitialised gradients of the inputs that are present and needed, in the order of `Gradients`."""
    differentiable = (getattr(inputs, name) for name in Gradients._fields)
    return Gradients._make(
        empty(tensor) if is_needed and tensor is not None else None
        for empty, tensor, is_needed in zip(_GRADIENT_LIKE, differentiable, needed, strict=True)
    )


def empty_image_scores(inputs: Inputs, wanted: bool) -> Tensor:
    """Uninitialised (B, Hq, Tq, K), in the precision of lse, or (0,) if not wanted."""
    q = inputs.q
    if not wanted:
        return q.new_empty(0)
    shape = (*q.shape[:3], num_images(inputs))
    return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def whole_rows(tensor: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy if its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
