"""A sketch of a model's weights: a few values and sums of each tensor, which show whether two models are the same.

The sums see any changed number. A tensor wider than 16 bits has one sum in each precision that its model may be loaded
in. The values are compared where no precision is common, and for quantised weights, which are dequantised first.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from valm.errors import ValmError
from valm.model.private_names import dequantized, offloaded_weight

# The sketch contains its version, under a name that no tensor uses. Sketches without a version are random projections.
VERSION_KEY, VERSION = "sketch version", "3"
SAMPLES = 16
# The golden ratio spreads the samples, so that they fall on different rows and columns in a tensor of any width.
GOLDEN_RATIO = 0.6180339887498949
# How far the samples of a quantised weight may differ, relative to their norm. EXACT allows for another device, COARSE
# for another quantisation. torchao, bitsandbytes and GGUF change a whole weight by 0.5 to 3 % in 8 bits and by 9 to
# 17 % in 4. For heavy-tailed weights, 16 samples change by up to 90 % (2,000 draws of Student's t, 3 degrees of
# freedom). Another model differs by about 140 %, and in some weights by more than COARSE.
EXACT, COARSE = 1e-5, 1.0
# Numbers that are rounded at once, so that rounding a weight takes little memory.
BLOCK = 1 << 20
# Largest difference between a number in bfloat16 and in float16: relative, and by the smallest number of float16.
HALVES = {"bfloat16", "float16"}
RELATIVE, SMALLEST = 2.0**-7, 2.0**-24


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """All parameters and persistent buffers, with their names and modules.

    `state_dict` would add a library's bookkeeping of quantised weights, and spoil the 4-bit weights that bitsandbytes
    0.50 has packed for a CPU.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".removeprefix("."), module, tensor


@torch.no_grad()
def sketch(model: Any) -> dict[str, str]:
    """How each parameter and persistent buffer is stored, SAMPLES of its values as base64, and its sums, by name.
    Weights of the fusion are skipped. Raises ValmError if a module was quantised by torch.ao, or a weight is divided
    among processes."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao."):
            raise ValmError(
                f"{name} of the model is a {type(module).__name__} of torch.ao, whose weights cannot be read: augment "
                "the model, or load or save its adapter, before quantising it"
            )
    whole = None if gguf_file(model) is None else "gguf"  # transformers dequantised it
    found = {VERSION_KEY: VERSION}
    for name, module, weight in named_weights(model):
        if isinstance(weight, DTensor):
            raise ValmError(
                f"{name} of the model is divided among processes (tp_plan or FSDP2): augment the model, or load or "
                "save its adapter, before dividing it; an augmented model saved whole may be loaded with a tp_plan"
            )
        if "image_fusion." not in name:
            kind = quantisation(weight) or whole or str(weight.dtype).removeprefix("torch.")
            values = _read(model, name, module, weight)
            sums = _sums(values) if values is not None and _is_dtype(kind) else {}
            found[name] = _encoded(kind, _samples(values), sums)
    return found


def other_tensor(found: Mapping[str, str], expected: Mapping[str, str], *, coarsely: bool = False) -> str | None:
    """The name of a tensor that is in only one sketch or differs between them; None if all agree.

    Tensors of different dtypes may differ by rounding to 16 bits.

    coarsely: a tensor that is quantised in either sketch may differ by as much as quantisation changes it.

    Raises:
        ValmError: `expected` is a sketch of another version.
    """
    if expected and expected.get(VERSION_KEY) != VERSION:
        raise ValmError(
            "another version of valm made the sketch of the base's weights, and this version cannot compare it: use "
            "that version, or augment and train the base again"
        )
    for name in sorted({*found, *expected} - {VERSION_KEY}):
        if name not in found or name not in expected or not _agree(found[name], expected[name], coarsely):
            return name
    return None


def _agree(found: str, expected: str, coarsely: bool) -> bool:
    try:
        (kind, numbers, sums), (other_kind, others, other_sums) = _decoded(found), _decoded(expected)
    except (binascii.Error, ValueError, TypeError, AttributeError):
        return False
    if not (_is_dtype(kind) and _is_dtype(other_kind)):
        if 0 in (len(numbers), len(others)):  # the quantisation library does not return them
            return coarsely or kind == other_kind
        limit = COARSE if coarsely else EXACT if kind == other_kind else 0.0
        return numbers.shape == others.shape and bool((numbers - others).norm() <= limit * others.norm())
    if any(sums[name] != other_sums[name] for name in sums.keys() & other_sums.keys()):
        return False
    for name in (kind, other_kind):  # both dtypes that either was rounded to
        numbers, others = (each.to(getattr(torch, name)).float() for each in (numbers, others))
    if {kind, other_kind} == HALVES and numbers.shape == others.shape:
        return torch.allclose(numbers, others, RELATIVE, SMALLEST)
    return numbers.equal(others)


def _encoded(kind: str, samples: np.ndarray, sums: Mapping[str, int]) -> str:
    named = ",".join(f"{name}={total}" for name, total in sums.items())
    return f"{kind}:{base64.b64encode(samples.tobytes()).decode()}:{named}"


def _decoded(entry: str) -> tuple[str, Tensor, dict[str, str]]:
    kind, content, named = entry.split(":")
    samples = np.frombuffer(base64.b64decode(content, validate=True), np.float32).copy()
    return kind, torch.from_numpy(samples), dict(total.split("=") for total in named.split(",") if total)


def _is_dtype(kind: str) -> bool:
    return isinstance(getattr(torch, kind, None), torch.dtype)


def quantisation(weight: Tensor) -> str | None:
    """The class name of a weight that torchao or bitsandbytes has quantised; None for other weights."""
    kind = type(weight).__name__
    return kind if type(weight).__module__.startswith("torchao.") or kind in ("Params4bit", "Int8Params") else None


def _samples(tensor: Tensor | None) -> np.ndarray:
    """(SAMPLES,) float32 values of a tensor; fewer if the tensor is smaller, none for None."""
    if tensor is None:
        return np.empty(0, np.float32)
    shares = torch.arange(1, min(SAMPLES, tensor.numel()) + 1, dtype=torch.float64) * GOLDEN_RATIO % 1
    places = (shares * tensor.numel()).long()
    return tensor.detach().reshape(-1)[places.to(tensor.device)].float().cpu().numpy()


def _sums(tensor: Tensor) -> dict[str, int]:
    """The sum of a tensor's 64-bit words, modulo 2**64, by dtype: in its own and, of wider numbers, rounded to 16 bits.
    Every device computes the same sums."""
    flat = tensor.detach().reshape(-1).contiguous()
    rounded = (torch.bfloat16, torch.float16) if flat.is_floating_point() and flat.itemsize > 2 else ()
    return {
        str(dtype).removeprefix("torch."): int(sum(_words(block.to(dtype)).sum() for block in flat.split(BLOCK)))
        for dtype in (flat.dtype, *rounded)
    }


def _words(flat: Tensor) -> Tensor:
    """The bits of a tensor of one dimension as int64."""
    bits = flat.view(torch.uint8)
    return (F.pad(bits, (0, -bits.numel() % 8)) if bits.numel() % 8 else bits).view(torch.int64)


def _read(model: Any, name: str, module: Any, weight: Any) -> Tensor | None:
    """The values of a weight, loaded if accelerate has offloaded it. None if its quantisation library does not return
    them."""
    if weight.device.type == "meta":
        return offloaded_weight(model, name)
    kind = quantisation(weight)
    if kind is None:
        return weight
    if kind not in ("Params4bit", "Int8Params"):
        with suppress(NotImplementedError):  # torchao's 4-bit weights raise it
            return weight.dequantize()
    elif not getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return dequantized(weight, module)
    return None


def gguf_file(model: Any) -> str | None:
    """The GGUF file, as given, that transformers loaded the model from; None if it was no GGUF file."""
    return getattr(getattr(getattr(model, "config", None), "quantization_config", None), "gguf_file", None)
