"""The checked inputs of visual_fusion_attn, as every implementation takes them."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of visual_fusion_attn, in the operator's order.

    Shapes and dtypes as there. At K = 0 image_k, image_v and all other image arguments are None. The values of
    image_index and image_slots are not checked yet. Where cu_seqlens is given, first_key says the same.
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
    image_slots: Tensor | None
    cu_seqlens: Tensor | None
    causal: bool
    scale: float
    softcap: float | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """q to cache_seqlens, in order: what the forward reads."""
        return self[:14]


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
    """K of either layout."""
    if inputs.image_index is not None:
        return inputs.image_index.shape[2]
    return 0 if inputs.image_k is None else inputs.image_k.shape[3]


def check_image_index(image_index: Tensor, pool_size: int) -> None:
    """Checks the values of image_index, which on CUDA waits for the device.

    Raises:
        ValueError: an index is outside [-1, pool_size).
    """
    if image_index.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(image_index))
    if low < -1 or high >= pool_size:
        wrong = low if low < -1 else high
        raise ValueError(
            f"image_index must be -1 (no image) or a row of the pool from 0 to {pool_size - 1}, got {wrong}"
        )


def check_cache_seqlens(cache_seqlens: Tensor, num_keys: int) -> None:
    """Checks the values of cache_seqlens, which on CUDA waits for the device.

    Raises:
        ValueError: a length is outside [0, num_keys].
    """
    low, high = (int(x) for x in torch.aminmax(cache_seqlens))
    if low < 0 or high > num_keys:
        wrong = low if low < 0 else high
        raise ValueError(f"cache_seqlens must be from 0 to {num_keys}, the keys that there are (Tk), got {wrong}")


def check_cu_seqlens(cu_seqlens: Tensor, num_keys: int) -> None:
    """Checks the values of cu_seqlens, which on CUDA waits for the device.

    Raises:
        ValueError: they do not rise from 0 to num_keys.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_keys:
        raise ValueError(
            f"cu_seqlens must begin with 0 and end with {num_keys}, the keys that there are (Tk), got {bounds[0]} and "
            f"{bounds[-1]}"
        )
    for n, (start, end) in enumerate(pairwise(bounds)):
        if start > end:
            raise ValueError(f"cu_seqlens must not fall, but document {n} begins at {start} and ends at {end}")
