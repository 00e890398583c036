"""Sorts the slots (b, t, k) of image_index by image: the backward sums a pool's gradients in this order."""

from __future__ import annotations

import torch
from torch import Tensor


def sorted_slots(image_index: Tensor, pool_size: int) -> tuple[Tensor, Tensor]:
    """The slots sorted by image, (B Tq K) int64, and the bounds of each image's slots, (U + 1) int64, on any device.

    If image_index has a row for each key head, results have Hkv rows.
    """
    # a GPU's sort takes time in proportion to the bits of its keys
    narrow = torch.int16 if pool_size <= torch.iinfo(torch.int16).max else torch.int32
    slots = image_index.transpose(0, 1).flatten(1) if image_index.dim() == 4 else image_index.flatten()
    slots = slots.contiguous()  # flatten may have made a view, whose layout the order would get
    image, order = torch.sort(slots.to(narrow), stable=True)
    images = torch.arange(pool_size + 1, dtype=narrow, device=image.device)
    if image.dim() == 2:
        images = images.repeat(image.shape[0], 1)
    return order, torch.searchsorted(image, images)
