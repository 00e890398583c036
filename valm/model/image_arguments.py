"""Checks the arguments of a model's call: the images, and what else the fusion layer reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from valm.errors import ValmError
from valm.model.config import FusionOptions
from valm.model.private_names import attention_of

# Attention implementations whose masks the fusion layer can read.
READABLE = ("sdpa", "eager")
# Values up to here in a mask that is added to the scores hide a key; libraries write -inf, the least number or -1e4.
HIDDEN = -1e3


def check_readable(config: Any) -> None:
    """Checks that the fusion layer can read the masks of a model with this config. Raises ValmError if the attention
    implementation makes other masks, or none (some take a window as an argument)."""
    implementation = attention_of(config.get_text_config(decoder=True))
    if implementation not in READABLE:
        raise ValmError(
            f'the model has attn_implementation="{implementation}", whose masks the fusion layer cannot read: load it '
            f"with {' or '.join(map(repr, READABLE))}, or set_attn_implementation"
        )


def check_call(config: Any, arguments: dict[str, Any]) -> None:
    """Checks arguments that the fusion layer cannot read.

    Raises:
        ValueError: `output_attentions` is set; the mask differs between heads or contains biases.
        ValmError: the model's attention implementation makes other masks.
    """
    check_readable(config)
    mask: Any = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1:
        raise ValueError("the fusion layer takes one attention_mask for all heads, got a mask for each head")
    added = isinstance(mask, Tensor) and mask.dim() == 4 and mask.is_floating_point()
    if added and not torch.compiler.is_compiling() and ((mask != 0) & (mask > HIDDEN)).any():
        raise ValueError("the fusion layer takes an attention_mask of 0 and -inf, got other biases")
    asked = arguments.get("output_attentions")
    if asked or (asked is None and config.output_attentions):
        raise ValueError(
            "output_attentions has no place for the weights of images: call fusion_attention() for the fusion layer's"
        )


def check_images(options: FusionOptions, shape: torch.Size, pool: Tensor | None, index: Tensor | None) -> None:
    """Checks image_pool and image_index against the model and the batch's `shape` (B, T). Raises ValueError if a shape
    is wrong, or one of them is missing."""
    if (pool is None) != (index is None):
        raise ValueError("image_pool and image_index must be given together")
    if pool is None or index is None:
        return
    if options.num_images == 0:
        raise ValueError("image_pool was given to a model with num_images = 0 (GPT-2*), which sees no images")
    if pool.dim() != 2 or pool.shape[1] != options.image_dim:
        raise ValueError(f"image_pool must have shape (U, image_dim = {options.image_dim}), got {tuple(pool.shape)}")
    if index.dim() != 3 or index.shape[:2] != shape:
        raise ValueError(f"image_index must have shape (B, T, K), (B, T) = {tuple(shape)}, got {tuple(index.shape)}")
