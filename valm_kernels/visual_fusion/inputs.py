"""The inputs of visual_fusion_attn once api.py has checked them: what every implementation computes from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of visual_fusion_attn, in the operator's order.

    Shapes and dtypes as there. K = 0 has image_k and image_v None, and everything of images with them. The values of
    image_index have not been looked at.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    image_k: Tensor | None
    image_v: Tensor | None
    image_q: Tensor | None
    image_index: Tensor | None
    image_mask: Tensor | None
    image_k_bias: Tensor | None
    image_v_bias: Tensor | None
    image_logit_bias: Tensor | None
    first_key: Tensor | None
    causal: bool
    scale: float
    softcap: float | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """q to first_key, in order."""
        return self[:-3]


class Gradients(NamedTuple):
    """The gradients of the inputs that have one; None where the input is absent or needs none."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    image_k: Tensor | None
    image_v: Tensor | None
    image_q: Tensor | None
    image_k_bias: Tensor | None
    image_v_bias: Tensor | None
    image_logit_bias: Tensor | None


def check_image_index(image_index: Tensor, pool_size: int) -> None:
    """Raises ValueError for an index outside [-1, pool_size). Reads the values, so CUDA would wait here."""
    if image_index.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(image_index))
    if low < -1 or high >= pool_size:
        wrong = low if low < -1 else high
        raise ValueError(
            f"image_index must be -1 (no image) or a row of the pool from 0 to {pool_size - 1}, got {wrong}"
        )
