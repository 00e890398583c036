"""The number of keys from which on impl="auto" runs flash attention for the text and a kernel that joins the images,
instead of one kernel for text and images.

It is estimated from the compiler's figures until a GPU has measured it. `make gpu-check` writes measured lengths to
measured_crossover.json, also those from which on cuDNN's attention replaces flash attention; VALM_KERNELS_CROSSOVER
names another such file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypedDict

import torch

from .. import json_files

# Keys times head dimension: 2,048 keys of 128 numbers, or 4,096 of 64.
ESTIMATE = 2048 * 128
# On GPUs of these compute capabilities, rounded down, PyTorch's own flash attention multiplies with the instructions of
# 8.0. Our kernels use the faster wgmma and tcgen05 up to this head dimension (benchmarks/records/triton_compile.csv).
# There no length is long unless a GPU has measured it.
OWN_PRODUCTS, OWN_PRODUCTS_DIM = (9, 10), 128
HEAD_DIMS = (64, 128, 256)
FILE = Path(__file__).with_name("measured_crossover.json")


class MeasuredCrossover(TypedDict):
    """An entry of measured_crossover.json, for head dimensions up to `head_dim` on GPUs of one compute capability."""

    capability: int  # 90 for 9.0
    head_dim: Literal[64, 128, 256]
    keys: int | None  # the text length from which on flash attention was faster; null if it never was
    cudnn_keys: int | None  # that from which on cuDNN's attention was faster than all else; null if never or not right
    longest: int  # the longest measured text
    device: str
    torch: str
    triton: str


def read_measured(path: Path) -> dict[tuple[int, int], MeasuredCrossover]:
    """The entries by (compute capability, largest head dimension).

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, or has another form; the message names it.
    """
    entries: list[MeasuredCrossover] = json_files.read_measured(path, MeasuredCrossover)
    for entry in entries:
        if entry["torch"] != torch.__version__:
            entry["cudnn_keys"] = None  # another PyTorch comes with another cuDNN, whose results nobody has checked
    return {(entry["capability"], entry["head_dim"]): entry for entry in entries}


NAMED = os.environ.get("VALM_KERNELS_CROSSOVER")
# Read at import, because torch.compile cannot trace the reading of a file.
MEASURED = read_measured(Path(NAMED or FILE)) if NAMED or FILE.exists() else {}


def is_long(keys: int, documents: int, head_dim: int, device: torch.device, by_pytorch: bool = True) -> bool:
    """Whether documents of `keys` keys together are long on average, so that flash attention reads their text.

    by_pytorch: the flash attention is PyTorch's own, not FlashAttention-3 or -4.
    """
    measured = _measured(head_dim, device)
    shortest, longest = (None, 0) if measured is None else (measured["keys"], measured["longest"])
    if shortest is not None:
        return keys >= shortest * documents
    if by_pytorch and head_dim <= OWN_PRODUCTS_DIM and capability(device) // 10 in OWN_PRODUCTS:
        return False
    return keys > longest * documents and keys * head_dim >= ESTIMATE * documents


def is_long_for_cudnn(keys: int, head_dim: int, device: torch.device) -> bool:
    """Whether cuDNN's attention was measured to be right and faster than all else for texts of `keys` keys."""
    measured = _measured(head_dim, device)
    shortest = None if measured is None else measured["cudnn_keys"]
    return shortest is not None and keys >= shortest


def _measured(head_dim: int, device: torch.device) -> MeasuredCrossover | None:
    most = next((most for most in HEAD_DIMS if head_dim <= most), 0)
    return MEASURED.get((capability(device), most)) if MEASURED else None


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> int:
    """The compute capability as one number, 90 for 9.0; 0 without an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
