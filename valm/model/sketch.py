"""A sketch of a model's weights: a few random projections of each tensor, which tell whether two models are the same.

A hash would differ between precisions, and a mean would miss most changes. A projection on random signs moves by about
the norm of what changed, which rounding to a 16-bit type keeps below 0.23 % of the tensor's own norm.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import load_offloaded_parameter

from valm.errors import ValmError

PROJECTIONS = 16
# Numbers that share their signs up to one sign for all, and how many such blocks are multiplied at once (16 MB).
BLOCK, SLAB = 1 << 14, 1 << 8
# How far the projections may move (RMS), relative to the tensor's norm. That of rounding is 2.2 times the worst case of
# bfloat16, which 16 projections exceed by chance once in 10^9 tensors. EXACT allows for the sketch's own float32; it
# holds where both tensors are of one type.
ROUNDING, EXACT = 0.005, 1e-5
# The largest error of a number that float16 rounds to a subnormal or to 0.
SMALLEST = 2.0**-25


class Projections(NamedTuple):
    """values: (PROJECTIONS,) float32. norm, size, dtype: of the tensor, as it was projected."""

    values: np.ndarray
    norm: float
    size: int
    dtype: str


def project(model: nn.Module, expected: Mapping[str, str] | None = None) -> dict[str, Projections]:
    """The projections of all parameters and persistent buffers but the fusion's, by name. Reads each once.

    expected: a sketch to be compared. Where its tensor has 16 bits, a wider one of the model is rounded to that type.

    Raises:
        ValmError: a weight is no tensor, as in what torch.ao has quantised, or is divided among processes.
    """
    expected = expected or {}
    state = {name: tensor for name, tensor in model.state_dict().items() if "image_fusion." not in name}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValmError(
                f"{name} of the model is a {type(value).__name__} and no tensor, as torch.ao's quantisation leaves it: "
                "augment the model, or load or save its adapter, before it is quantised"
            )
        if isinstance(value, DTensor):
            raise ValmError(
                f"{name} of the model is divided among processes, as by a tp_plan or FSDP2: augment the model, or load "
                "or save its adapter, before that; a whole augmented folder may be loaded with a tp_plan"
            )
    return {name: _project(_loaded(model, name, tensor), expected.get(name)) for name, tensor in state.items()}


def sketch(found: dict[str, Projections]) -> dict[str, str]:
    """The projections as a JSON file has them."""
    return {name: f"{each.dtype}:{base64.b64encode(each.values.tobytes()).decode()}" for name, each in found.items()}


def other_tensor(found: dict[str, Projections], expected: dict[str, str]) -> str | None:
    """The name of a tensor that is in one of both only, or has other values; None if all agree.

    Tensors of different types may differ by rounding to 16 bits.
    """
    for name in sorted({*found, *expected}):
        if name not in found or name not in expected or not _agree(found[name], expected[name]):
            return name
    return None


def _agree(found: Projections, expected: str) -> bool:
    try:
        dtype, _, content = expected.partition(":")
        values = np.frombuffer(base64.b64decode(content, validate=True), np.float32)
    except (binascii.Error, ValueError, TypeError, AttributeError):
        return False
    if values.shape != found.values.shape:
        return False
    moved = float(np.sqrt(np.square(found.values.astype(np.float64) - values).mean()))
    if found.dtype == dtype:
        return moved <= EXACT * found.norm
    return moved <= ROUNDING * found.norm + 2.2 * SMALLEST * found.size**0.5


def _loaded(model: Any, name: str, tensor: Tensor) -> Tensor:
    """The tensor, or its values in memory or on disk where accelerate has offloaded them."""
    return load_offloaded_parameter(model, name) if tensor.device.type == "meta" else tensor


def _project(tensor: Tensor, expected: str | None) -> Projections:
    flat = tensor.detach().reshape(-1)
    narrow = getattr(torch, str(expected).partition(":")[0], None)
    rounds = isinstance(narrow, torch.dtype) and narrow.is_floating_point and narrow.itemsize <= 2
    dtype = narrow if rounds and flat.is_floating_point() and flat.dtype.itemsize > 2 else flat.dtype
    # on CPU ten times faster than float64; on a GPU float32 may mean TF32
    wide = torch.float32 if tensor.device.type == "cpu" else torch.float64
    signs = _signs(tensor.device).to(wide)
    values = torch.zeros(PROJECTIONS, dtype=torch.float64)
    square = 0.0
    for number, slab in enumerate(flat.split(SLAB * BLOCK)):
        numbers = slab.to(dtype).to(wide)
        norm = float(torch.linalg.vector_norm(numbers))
        if not math.isfinite(norm):  # a mask with -inf, for one
            numbers = numbers.nan_to_num(0.0, 0.0, 0.0)
            norm = float(torch.linalg.vector_norm(numbers))
        square += norm**2
        blocks = F.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
        products = (blocks @ signs).to("cpu", torch.float64)
        values += _random_signs(f"blocks {number}", len(blocks)) @ products
    return Projections(values.numpy().astype(np.float32), square**0.5, len(flat), str(dtype).removeprefix("torch."))


@functools.lru_cache(2)
def _signs(device: torch.device) -> Tensor:
    return _random_signs("signs", BLOCK * PROJECTIONS).view(BLOCK, PROJECTIONS).to(device)


def _random_signs(seed: str, count: int) -> Tensor:
    """From a hash, as the random numbers of PyTorch may be others in another version."""
    drawn = hashlib.shake_128(seed.encode()).digest(-(-count // 8))
    return torch.from_numpy(np.unpackbits(np.frombuffer(drawn, np.uint8), count=count) * 2.0 - 1.0)
