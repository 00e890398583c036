"""The checked inputs of visual_fusion_attn, as every implementation takes them."""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of visual_fusion_attn, in the operator's order.

    Shapes and dtypes as in visual_fusion_attn. Without image_k and image_v, all image arguments are None. The
    values of image_index are not checked yet. If cu_seqlens is given, first_key contains its limits too.
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
    image_score_bias: Tensor | None
    first_key: Tensor | None
    cache_seqlens: Tensor | None
    cu_seqlens: Tensor | None
    causal: bool
    scale: float
    softcap: float | None
    max_seqlen: int | None

    @property
    def by_head(self) -> bool:
        """Whether each key head sees its own images: image_index is (B, Hkv, Tq, K)."""
        return self.image_index is not None and self.image_index.dim() == 4

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that the forward reads: q to cache_seqlens, in order."""
        return self[:14]

    def without_images(self) -> Inputs:
        return self._replace(**_NO_IMAGES)


# The type of each field.
TYPES = get_type_hints(Inputs)
# The fields before the options.
TENSOR_NAMES = tuple(name for name, kind in TYPES.items() if kind in (Tensor, Tensor | None))
_NO_IMAGES: dict[str, Any] = dict.fromkeys(name for name in TENSOR_NAMES if name.startswith("image_"))


class Gradients(NamedTuple):
    """The gradients of the differentiable inputs; None where the input is absent or needs none."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    image_k: Tensor | None
    image_v: Tensor | None
    image_q: Tensor | None
    image_k_bias: Tensor | None
    image_v_bias: Tensor | None
    image_logit_bias: Tensor | None
    image_score_bias: Tensor | None


def num_images(inputs: Inputs) -> int:
    """K, in the dense or the pooled layout."""
    if inputs.image_index is not None:
        return inputs.image_index.shape[-1]
    return 0 if inputs.image_k is None else inputs.image_k.shape[3]
