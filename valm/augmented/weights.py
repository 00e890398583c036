"""Attention weights of an augmented model's fusion layer, which `forward` never materialises."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn

from valm.augmented.attention import (
    Images,
    image_arguments,
    joint_weights,
    limit_arguments,
    read_limits,
    why_joint_eager,
    without_sink,
)
from valm_kernels import attention_weights


def fusion_weights(model: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The weights over text (B, H, T, T) and over images (B, H, T, K) of an augmented model on `inputs`.

    The forward pass ends at the fusion layer.
    """
    try:
        model(**inputs, use_cache=False, read_weights=_read_weights)
    except _WeightsRead as read:
        return read.text, read.images
    raise AssertionError("the fusion layer did not call transformers' attention interface")


class _WeightsRead(Exception):
    """Ends the forward pass when the weights have been read."""

    def __init__(self, text: Tensor, images: Tensor):
        self.text, self.images = text, images


def _read_weights(
    query: Tensor,
    key: Tensor,
    seen: Tensor | None,
    scale: float,
    images: Images | None,
    softcap: float | None,
    position_bias: Tensor | None,
    sink: Tensor | None,
) -> NoReturn:
    """Arguments as those of `joint_weights`."""
    limits = read_limits(seen)
    if why_joint_eager(query, query, position_bias, seen, limits) is not None:
        raise _WeightsRead(*joint_weights(query, key, images, seen, scale, softcap, position_bias, sink))
    text, image, lse = attention_weights(
        query,
        key,
        None if images is None else images.keys,
        **image_arguments(query, images, query.shape[-1]),
        **limit_arguments(query, limits),
        scale=scale,
        softcap=softcap,
    )
    if sink is not None:
        share = without_sink(lse, sink)[..., None]
        text, image = text * share, image * share
    raise _WeightsRead(text, image)
