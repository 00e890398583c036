"""The inputs of visual_fusion_attn once api.py has checked them: what every implementation computes from."""

from __future__ import annotations

from typing import NamedTuple

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
    image_index: Tensor | None
    image_mask: Tensor | None
    image_k_bias: Tensor | None
    image_v_bias: Tensor | None
    image_logit_bias: Tensor | None
    first_key: Tensor | None
    causal: bool
    scale: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """q to first_key, in order."""
        return self[:-2]
