"""A sketch of a model's weights: a few random projections of each tensor, which tell whether two models are the same.

A hash would differ between precisions, and a mean would miss most changes. A projection on random signs moves by about
the norm of what changed, which rounding to a 16-bit type keeps below 0.23 % of the tensor's own norm. Quantised weights
are projected as the numbers that they stand for.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
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
# As ROUNDING, of a quantised weight. Of normal and of heavy-tailed weights (Student's t, 3 degrees of freedom) torchao,
# bitsandbytes and GGUF change 0.5 to 3 % of the norm in 8 bits, 9 to 17 % in 4. Another model differs by about 140 %.
COARSE = 0.5
# The largest error of a number that float16 rounds to a subnormal or to 0.
SMALLEST = 2.0**-25


class Projections(NamedTuple):
    """values: (PROJECTIONS,) float32, or (0,) of a quantised weight that cannot be read. norm, size: of the tensor, as
    it was projected. kind: its dtype, or how it is quantised."""

    values: np.ndarray
    norm: float
    size: int
    kind: str


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """All parameters and persistent buffers, with their names and modules.

    Not by `state_dict`, which also has what a library needs to read its quantised weights, and which spoils those of
    bitsandbytes 0.50 in 4 bits where it has packed them for a CPU.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".removeprefix("."), module, tensor


def project(model: Any, expected: Mapping[str, str] | None = None) -> dict[str, Projections]:
    """The projections of all parameters and persistent buffers but the fusion's, by name. Reads each once.

    expected: a sketch to be compared. Where its tensor has 16 bits, a wider one of the model is rounded to that type.

    Raises:
        ValmError: a module is one of those that torch.ao's quantisation leaves, or a weight is divided among processes.
    """
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao."):
            raise ValmError(
                f"{name} of the model is a {type(module).__name__} of torch.ao, whose weights cannot be read: augment "
                "the model, or load or save its adapter, before it is quantised"
            )
    expected = expected or {}
    whole = None if gguf_file(model) is None else "gguf"  # which transformers has dequantised
    found = {}
    for name, module, weight in named_weights(model):
        if isinstance(weight, DTensor):
            raise ValmError(
                f"{name} of the model is divided among processes, as by a tp_plan or FSDP2: augment the model, or load "
                "or save its adapter, before that; a whole augmented folder may be loaded with a tp_plan"
            )
        if "image_fusion." not in name:
            tensor, quantised = _read(model, name, module, weight)
            found[name] = _project(tensor, quantised or whole, expected.get(name))
    return found


def sketch(found: dict[str, Projections]) -> dict[str, str]:
    """The projections as a JSON file has them."""
    return {name: f"{each.kind}:{base64.b64encode(each.values.tobytes()).decode()}" for name, each in found.items()}


def other_tensor(found: dict[str, Projections], expected: dict[str, str], *, coarsely: bool = False) -> str | None:
    """The name of a tensor that is in one of both only, or has other values; None if all agree.

    Tensors of different types may differ by rounding to 16 bits.

    coarsely: a tensor that is quantised in one of both may differ by what that changes.
    """
    for name in sorted({*found, *expected}):
        if name not in found or name not in expected or not _agree(found[name], expected[name], coarsely):
            return name
    return None


def _agree(found: Projections, expected: str, coarsely: bool) -> bool:
    try:
        kind, _, content = expected.partition(":")
        values = np.frombuffer(base64.b64decode(content, validate=True), np.float32)
    except (binascii.Error, ValueError, TypeError, AttributeError):
        return False
    quantised = _is_quantised(kind) or _is_quantised(found.kind)
    if quantised and 0 in (len(values), len(found.values)):
        return coarsely or kind == found.kind
    if values.shape != found.values.shape:
        return False
    moved = float(np.sqrt(np.square(found.values.astype(np.float64) - values).mean()))
    if quantised and coarsely:
        return moved <= COARSE * found.norm
    if quantised or found.kind == kind:
        return found.kind == kind and moved <= EXACT * found.norm
    return moved <= ROUNDING * found.norm + 2.2 * SMALLEST * found.size**0.5


def _is_quantised(kind: str) -> bool:
    return not isinstance(getattr(torch, kind, None), torch.dtype)


def quantisation(weight: Tensor) -> str | None:
    """How torchao or bitsandbytes has quantised a weight: the name of its class; None if neither has."""
    kind = type(weight).__name__
    return kind if type(weight).__module__.startswith("torchao.") or kind in ("Params4bit", "Int8Params") else None


def _read(model: Any, name: str, module: Any, weight: Any) -> tuple[Tensor | None, str | None]:
    """The numbers of a weight, from memory or disk where accelerate has offloaded it, and how it is quantised (None: it
    is not). None for numbers that its library does not tell."""
    if weight.device.type == "meta":
        return load_offloaded_parameter(model, name), None
    kind = quantisation(weight)
    if kind is None:
        return weight, None
    if kind not in ("Params4bit", "Int8Params"):
        with suppress(NotImplementedError):  # of torchao's in 4 bits
            return weight.dequantize(), kind
    elif not getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(weight, getattr(module, "state", None)), kind
    return None, kind


def gguf_file(model: Any) -> str | None:
    """The GGUF file that transformers has read the model from, as it was given; None if it was none."""
    return getattr(getattr(getattr(model, "config", None), "quantization_config", None), "gguf_file", None)


def _project(tensor: Tensor | None, quantised: str | None, expected: str | None) -> Projections:
    if tensor is None:
        return Projections(np.zeros(0, np.float32), 0.0, 0, str(quantised))
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
    kind = quantised or str(dtype).removeprefix("torch.")
    return Projections(values.numpy().astype(np.float32), square**0.5, len(flat), kind)


@functools.lru_cache(2)
def _signs(device: torch.device) -> Tensor:
    return _random_signs("signs", BLOCK * PROJECTIONS).view(BLOCK, PROJECTIONS).to(device)


def _random_signs(seed: str, count: int) -> Tensor:
    """From a hash, as the random numbers of PyTorch may be others in another version."""
    drawn = hashlib.shake_128(seed.encode()).digest(-(-count // 8))
    return torch.from_numpy(np.unpackbits(np.frombuffer(drawn, np.uint8), count=count) * 2.0 - 1.0)
