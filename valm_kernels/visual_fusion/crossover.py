"""From how many keys on flash attention for the text, and a kernel that joins the images, beat one kernel for both.

An estimate from the compiler's figures, until a card has measured it: measured_crossover.json, which `make gpu-check`
writes, has the lengths of the cards that have. VALM_KERNELS_CROSSOVER names another such file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypedDict

import torch

from ..json_files import read_json

# Keys times head dimension: 2,048 keys of 128 numbers, or 4,096 of 64.
ESTIMATE = 2048 * 128
HEAD_DIMS = (64, 128, 256)
FILE = Path(__file__).with_name("measured_crossover.json")


class MeasuredCrossover(TypedDict):
    """An entry of measured_crossover.json, for head dimensions up to `head_dim` on the cards of one capability."""

    capability: int  # 90 for 9.0
    head_dim: Literal[64, 128, 256]
    keys: int | None  # of a text, from which on flash attention was faster; null where it was not at the longest
    longest: int  # that was measured
    device: str
    torch: str
    triton: str


def read_measured(path: Path) -> dict[tuple[int, int], tuple[int | None, int]]:
    """The measured lengths, and the longest, by (compute capability, largest head dimension).

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON; the message names it.
    """
    entries: list[MeasuredCrossover] = read_json(path)
    return {(entry["capability"], entry["head_dim"]): (entry["keys"], entry["longest"]) for entry in entries}


NAMED = os.environ.get("VALM_KERNELS_CROSSOVER")
# Read once, and not while torch.compile looks on, which knows no files.
MEASURED = read_measured(Path(NAMED or FILE)) if NAMED or FILE.exists() else {}


def is_long(keys: int, documents: int, head_dim: int, device: torch.device) -> bool:
    """Whether documents of so many keys together are long on average: flash attention takes their text."""
    shortest, longest = None, 0
    if MEASURED:
        most = next((most for most in HEAD_DIMS if head_dim <= most), 0)
        shortest, longest = MEASURED.get((capability(device), most), (None, 0))
    if shortest is not None:
        return keys >= shortest * documents
    return keys > longest * documents and keys * head_dim >= ESTIMATE * documents


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> int:
    """The compute capability as one number, 90 for 9.0; 0 without a card of NVIDIA's."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
