"""Weights that depend only on the name and shape of each tensor, so that a record of outputs needs no weights."""

import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

# Gains of normalisation stay near 1.
GAINS = ("norm", "ln_", "layernorm")


def drawn(name: str, shape: torch.Size) -> torch.Tensor:
    """The values of the tensor `name`. RandomState returns equal numbers in every version of numpy."""
    numbers = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if len(shape) > 1:
        scale, offset = 0.3, 0.0
    else:
        scale, offset = 0.1, 1.0 if name.endswith("weight") and any(gain in name for gain in GAINS) else 0.0
    return torch.tensor(offset + scale * numbers)


@torch.no_grad()
def draw(model: torch.nn.Module) -> None:
    """Sets every parameter of `model` to its random value. Parameters that are stored as a difference from their
    initial value were recorded as the value itself."""
    options = getattr(model, "fusion_options", None)
    for name, parameter in model.named_parameters():
        value = drawn(name.removesuffix("_delta"), parameter.shape)
        if name.endswith("_delta"):
            value -= getattr(options, name.rpartition(".")[2].removesuffix("_delta"))
        parameter.copy_(value)


def save(outputs: dict[str, torch.Tensor], file: Path) -> None:
    """Writes outputs, those of float64 as float32."""
    narrow = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in outputs.items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in narrow.items()}, file)
    print(f"{file}: {len(outputs)} tensors, {file.stat().st_size:,} bytes")
