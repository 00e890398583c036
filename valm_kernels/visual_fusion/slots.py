"""Sorts the slots (b, t, k) of image_index by image: the backward sums a pool's gradients in this order."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .checks import check_image_index, check_index_on_cpu
from .inputs import Inputs


def sort_image_slots(image_index: Tensor, pool_size: int) -> Tensor:
    """The `image_slots` of `visual_fusion_attn`, for an image_index that is known before the training step.

    It is meant to move the backward's sort from the GPU to the data loader. Today the backward on CUDA still sorts
    image_index itself, so this saves no time.

    Args:
        image_index: (B, Tq, K) or (B, Hkv, Tq, K) int32 or int64 on the CPU, rows of the pool; -1 means no image.
        pool_size: U, the number of images in the pool.

    Returns:
        (U + 1 + B Tq K,) int32. The first U + 1 numbers are the positions, in the rest, at which the slots of each
        image begin, and the end of the last. The rest are the numbers (b Tq + t) K + k of all slots, sorted by image
        and rising within an image. Slots without an image come first. If image_index has a row for each key head, so
        has the result: (Hkv, U + 1 + B Tq K).

    Raises:
        TypeError: image_index has the wrong type or dtype, or pool_size is not an int.
        ValueError: image_index has the wrong shape, is not on the CPU, or contains a number outside [-1, U).

    Example:
        >>> image_index = torch.tensor([[[2, 0], [0, -1]]])  # B Tq K
        >>> valm_kernels.sort_image_slots(image_index, pool_size=3)
        tensor([1, 3, 3, 4, 3, 1, 2, 0], dtype=torch.int32)
    """
    if isinstance(pool_size, bool) or not isinstance(pool_size, Integral):
        raise TypeError(f"pool_size must be an int, got {pool_size!r}")
    check_index_on_cpu(image_index)
    check_image_index(image_index, pool_size)
    order, bounds = sorted_slots(image_index, pool_size)
    return torch.cat([bounds, order], -1).int()


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


def check_pool(inputs: Inputs) -> None:
    """Checks the values of image_index and image_slots, which on CUDA waits for the device.

    Raises:
        ValueError: an index is not in the pool, or image_slots differs from `sort_image_slots`.
    """
    if inputs.image_index is None or inputs.image_k is None:
        return
    pool_size = inputs.image_k.shape[1]
    if torch.compiler.is_compiling():  # a graph cannot read values, and index U would be the reference's row of zeros
        known = (inputs.image_index >= -1) & (inputs.image_index < pool_size)
        torch._assert_async(known.all(), f"image_index must be -1 (no image) or a row of the pool below {pool_size}")
        return
    check_image_index(inputs.image_index, pool_size)
    if inputs.image_slots is not None:
        order, bounds = sorted_slots(inputs.image_index, pool_size)
        if not inputs.image_slots.equal(torch.cat([bounds, order], -1).int()):
            raise ValueError("image_slots does not belong to this image_index: pass sort_image_slots(image_index, U)")
