"""What the launchers of the Triton kernels share: inputs, strides, compile-time arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from valm_kernels.visual_fusion.inputs import Inputs
from valm_kernels.visual_fusion.layout import whole_rows
from valm_kernels.visual_fusion.triton.primitives import LOG2E
from valm_kernels.visual_fusion.triton.tiles import block_d


def kernel_inputs(inputs: Inputs) -> Inputs:
    """The inputs as kernels read them: rows are contiguous, the small tensors have no gaps."""
    rows = (None if x is None else whole_rows(x) for x in inputs[:6])
    return Inputs(*rows, *(contiguous(x) for x in inputs.tensors[6:]), *inputs[len(inputs.tensors) :])


def kernel_constants(q: Tensor, k: Tensor, causal: bool) -> dict[str, Any]:
    """The compile-time arguments that all attention kernels share, but for the tiles."""
    head_dim, group = q.shape[3], q.shape[1] // k.shape[1]
    return {
        "D": head_dim,
        "G": group,
        "CAUSAL": causal,
        # one tf32 term keeps 11 bits of a float32 product, three keep nearly all
        "INPUT_PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee",
        "BLOCK_D": block_d(head_dim),
        "BLOCK_G": triton.next_power_of_2(group),
    }


def num_images(image_k: Tensor | None, image_index: Tensor | None) -> int:
    """K of either layout."""
    if image_index is not None:
        return image_index.shape[2]
    return 0 if image_k is None else image_k.shape[3]


def softcap_log2(inputs: Inputs) -> float | None:
    """The cap in the units of the kernels' scores."""
    return None if inputs.softcap is None else inputs.softcap * LOG2E.value


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides (batch, head, position) of a (B, H, T, D) tensor."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def image_strides(image: Tensor | None, pooled: bool) -> tuple[int, int, int, int]:
    """Strides (batch, head, position, slot) by which the kernels address a dense image tensor or a pool."""
    if image is None:
        return 0, 0, 0, 0
    if pooled:
        return 0, image.stride(0), 0, image.stride(1)
    return image.stride(0), image.stride(1), image.stride(2), image.stride(3)


def contiguous(x: Tensor | None) -> Tensor | None:
    """x without gaps: the small tensors (index, mask, biases, first_key, lse) are addressed without strides."""
    return None if x is None else x.contiguous()


def architecture(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; under the interpreter that of the oldest supported card."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """How many programs the chip runs side by side at the least; 1 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
