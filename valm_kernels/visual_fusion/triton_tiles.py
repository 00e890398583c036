"""Tile sizes, warps and pipeline stages of the Triton kernels, by architecture, head dimension and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Tiles:
    """BLOCK_M query rows by BLOCK_N keys, computed by num_warps warps; num_stages loads of tiles in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """Launch options. Fused multiply-add is asked for by name: its default differs between Triton versions."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def block_d(head_dim: int) -> int:
    """Columns of a tile: the head dimension rounded up to a power of two that tile products accept."""
    return max(16, triton.next_power_of_2(head_dim))


def tiles_for(kernel: str, arch: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles of `kernel` ("forward", "decode", "query", "key") on compute capability `arch`."""
    return Tiles(64, 64, 4, 2)
