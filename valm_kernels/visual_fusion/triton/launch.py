"""Common parts of the launchers of the Triton kernels: inputs, strides, compile-time arguments."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..inputs import TENSOR_NAMES, Inputs
from .primitives import LOG2E
from .tiles import Tiles, block_d, tiles_for

# Bytes of the widest load and store.
VECTOR = 16
# The tensors that kernels address by strides.
ROWS = frozenset(TENSOR_NAMES[:6])

# Strides (batch, head, position), and (batch, head, position, slot).
RowStrides = tuple[int, ...]
ImageStrides = tuple[int, ...]


def kernel_inputs(inputs: Inputs) -> Inputs:
    """The inputs as kernels read them: rows are contiguous and aligned, small tensors contiguous."""
    copies: dict[str, Any] = {}
    tensors: tuple[Any, ...] = inputs[: len(TENSOR_NAMES)]
    for name, given in zip(TENSOR_NAMES, tensors, strict=True):
        if given is not None:
            read = aligned_rows(given if name in ROWS else given.contiguous())
            if read is not given:
                copies[name] = read
    return inputs._replace(**copies) if copies else inputs


def aligned_rows(x: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy if its last dimension is strided or if a copy would align its rows."""
    multiple = _address_multiple(x.shape, x.stride(), x.element_size())
    if multiple and x.data_ptr() % multiple == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


# Only the latest layouts are cached: during generation the layout of the keys changes at every step.
@lru_cache(maxsize=1024)
def _address_multiple(shape: torch.Size, strides: tuple[int, ...], itemsize: int) -> int:
    """A tensor's rows are contiguous and aligned if its address is a multiple of this number; 0: they never are."""
    *sizes, row = shape
    *strides_of_rows, last = strides
    if last != 1 and row > 1:
        return 0
    if row * itemsize % VECTOR:
        return 1
    # the stride of a single row means nothing
    apart = [stride for size, stride in zip(sizes, strides_of_rows, strict=True) if size > 1]
    return 0 if any(stride * itemsize % VECTOR for stride in apart) else VECTOR


def choose_tiles(kernel: str, inputs: Inputs) -> Tiles:
    """The tiles of `kernel`, a name in the table in tiles.py, on the device of the inputs."""
    q = inputs.q
    return tiles_for(kernel, architecture(q.device), q.shape[3], q.dtype)


def kernel_constants(q: Tensor, k: Tensor, causal: bool) -> dict[str, Any]:
    """The compile-time arguments that all attention kernels share, except the tiles."""
    return _constants(q.shape[3], q.shape[1] // k.shape[1], q.dtype, causal, architecture(q.device))


@cache
def _constants(head_dim: int, group: int, dtype: torch.dtype, causal: bool, arch: int | str) -> dict[str, Any]:
    # one tf32 term keeps 11 bits of a float32 product, three keep nearly all; AMD GPUs multiply in float32
    tf32 = dtype == torch.float32 and isinstance(arch, int)
    return {
        "D": head_dim,
        "G": group,
        "CAUSAL": causal,
        "ALIGNED": head_dim * dtype.itemsize % VECTOR == 0,
        "INPUT_PRECISION": "tf32x3" if tf32 else "ieee",
        "BY_SLABS": tf32 and head_dim > 128,
        "BLOCK_D": block_d(head_dim),
        "BLOCK_G": triton.next_power_of_2(group),
    }


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own function takes several microseconds on the host."""
    return -(-a // b)


def softcap_log2(inputs: Inputs) -> float | None:
    """The cap in the units of the kernels' scores."""
    return None if inputs.softcap is None else inputs.softcap * LOG2E.value


def strides(x: Tensor | None) -> RowStrides:
    """Strides (batch, head, position) of a (B, H, T, D) tensor."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def image_strides(image: Tensor | None, pooled: bool) -> ImageStrides:
    """Strides (batch, head, position, slot) by which the kernels address a dense image tensor or a pool."""
    if image is not None and pooled:
        return 0, image.stride(0), 0, image.stride(1)
    return dense_strides(image)


def dense_strides(image: Tensor | None) -> ImageStrides:
    """Strides (batch, head, position, slot) of a tensor with these and D as its last dimensions."""
    return (0, 0, 0, 0) if image is None else image.stride()[-5:-1]


def contiguous(x: Tensor | None) -> Tensor | None:
    """x, contiguous: the small tensors (index, mask, biases, first_key, lse) are addressed without strides."""
    return None if x is None else x.contiguous()


@cache
def architecture(device: torch.device) -> int | str:
    """Compute capability as one number, 90 for 9.0, or the name of an AMD architecture, such as "gfx942".

    Under the interpreter it is the oldest supported compute capability.
    """
    if device.type != "cuda":
        return 80
    if torch.version.hip is not None:  # whose devices have a capability too: (9, 4)
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """The least number of programs that the GPU runs at once; 1 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
