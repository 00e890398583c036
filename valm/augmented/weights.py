"""Attention weights of an augmented model's fusion layer, which `forward` never materialises."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from valm.augmented.attention import (
    Images,
    VisualAttention,
    fusion_attention,
    image_arguments,
    joint_weights,
    limit_arguments,
    read_limits,
    visible_keys,
    why_joint_eager,
    without_sink,
)
from valm_kernels import attention_weights

# The name under which transformers' attention interface knows `_read_weights`.
WEIGHTS_IMPLEMENTATION = "valm-weights"


def fusion_weights(model: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The weights over text (B, H, T, T) and over images (B, H, T, K) of an augmented model on `inputs`.

    The forward pass ends at the fusion layer.
    """
    attention: Any = next(module for module in model.modules() if isinstance(module, VisualAttention))
    config, attention.config = attention.config, copy.copy(attention.config)
    attention.config._attn_implementation_internal = WEIGHTS_IMPLEMENTATION
    try:
        model(**inputs, use_cache=False)
    except _WeightsRead as read:
        return read.text, read.images
    finally:
        attention.config = config
    raise AssertionError("the fusion layer did not call transformers' attention interface")


class _WeightsRead(Exception):
    """Ends the forward pass when the weights have been read."""

    def __init__(self, text: Tensor, images: Tensor):
        self.text, self.images = text, images


def _read_weights(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    images: Images | None = None,
    caught: list | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """As `fusion_attention`, but reads the weights."""
    if caught is not None:
        return fusion_attention(module, query, key, value, attention_mask, scaling, caught=caught)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    seen = visible_keys(attention_mask)
    limits = read_limits(seen)
    if why_joint_eager(query, query, position_bias, seen, limits) is not None:
        raise _WeightsRead(*joint_weights(query, key, images, seen, scale, softcap, position_bias, s_aux))
    text, image, lse = attention_weights(
        query,
        key,
        None if images is None else images.keys,
        **image_arguments(query, images, query.shape[-1]),
        **limit_arguments(query, limits),
        scale=scale,
        softcap=softcap,
    )
    if s_aux is not None:
        share = without_sink(lse, s_aux)[..., None]
        text, image = text * share, image * share
    raise _WeightsRead(text, image)


AttentionInterface.register(WEIGHTS_IMPLEMENTATION, _read_weights)
