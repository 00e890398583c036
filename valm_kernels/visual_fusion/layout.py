"""How outputs lie in memory: the fake kernels promise these layouts, and every implementation keeps them.

out and the gradients of the images are `empty_rows_like` their input, the gradients of q, k, v and image_q are
`empty_tokens_first`, everything else is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor


def empty_tokens_first(like: Tensor) -> Tensor:
    """An uninitialised (B, H, T, D) tensor whose memory is (B, T, H, D): what a projection's backward reads."""
    batch, heads, tokens, dim = like.shape
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def empty_rows_like(like: Tensor) -> Tensor:
    """An uninitialised tensor laid out like `like`, or contiguous where the last dimension of `like` is strided."""
    whole_rows = like.stride(-1) == 1
    return torch.empty_like(like, memory_format=torch.preserve_format if whole_rows else torch.contiguous_format)


def whole_rows(tensor: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy where its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
