"""Tile sizes, warps and pipeline stages of the Triton kernels, by architecture, head dimension and dtype.

The table is not yet measured on a GPU. Each entry was chosen from the compiler's report
(benchmarks/records/triton_compile.csv). Candidates are tiles whose warps share the products of a tile and whose loops
over keys or queries spill no registers. The entry is the candidate that reuses most.

- If a block has fewer rows than its warps' instructions, groups of warps compute the same products: 8 warps need 128
  rows with wgmma, and 128 rows or 64 columns with mma.sync.
- Spills before those loops, or in the loop over images, which waits for its loads, cost less than smaller tiles.
- Float32 above D = 128 is read by slabs (`primitives.products`), with tiles chosen at 256.
- A joined kernel reuses nothing, as every query sees its own images: its tiles keep most copies and warps in flight.
- There are three stages if they fit: with two, the copy of the next tile starts only after the work on this tile.
- On AMD a block of 16 makes Triton use smaller instructions, and a second stage takes registers.

Measured tiles of a compute capability replace the table. `make gpu-check` writes them to measured_tiles.json;
VALM_KERNELS_TILES names another such file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
import triton

from ...json_files import read_measured


@dataclass(frozen=True)
class Tiles:
    """BLOCK_M query rows by BLOCK_N keys, computed by num_warps warps, with num_stages loads of tiles in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments and launch options. Fused multiply-add is set, because its default differs between
        Triton versions."""
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# By (kernel, bytes of an element, architecture): the tiles for D up to 64, 128 and 256. The entries of 80 stay within
# 99 KiB of shared memory, so that they serve compute capabilities 8.6, 8.9 and 12.x too, except the kernels with
# an entry of 120. AMD entries stay within 64 KiB.
_TILES: dict[tuple[str, int, int | str], tuple[Tiles, Tiles, Tiles]] = {
    ("forward", 2, 80): (Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 3), Tiles(32, 64, 8, 2)),
    ("forward", 2, 90): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(32, 64, 8, 3)),
    ("forward", 2, 100): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(32, 64, 8, 3)),
    ("forward", 2, "AMD"): (Tiles(128, 64, 4, 2), Tiles(128, 32, 4, 1), Tiles(64, 16, 4, 1)),
    ("forward", 4, 80): (Tiles(32, 32, 4, 3), Tiles(32, 32, 4, 2), Tiles(16, 64, 8, 1)),
    ("forward", 4, 90): (Tiles(128, 32, 8, 3), Tiles(32, 32, 4, 3), Tiles(16, 64, 8, 2)),
    ("forward", 4, 100): (Tiles(128, 32, 8, 3), Tiles(32, 32, 4, 3), Tiles(16, 64, 8, 2)),
    ("forward", 4, 120): (Tiles(32, 32, 4, 3), Tiles(32, 64, 8, 1), Tiles(16, 64, 8, 1)),
    ("forward", 4, "AMD"): (Tiles(128, 32, 4, 1), Tiles(64, 16, 4, 1), Tiles(64, 16, 4, 1)),
    ("decode", 2, 80): (Tiles(16, 128, 4, 3), Tiles(16, 64, 4, 3), Tiles(16, 32, 4, 3)),
    ("decode", 2, 90): (Tiles(16, 128, 4, 3), Tiles(16, 64, 4, 3), Tiles(16, 32, 4, 3)),
    ("decode", 2, 100): (Tiles(16, 128, 4, 3), Tiles(16, 64, 4, 3), Tiles(16, 32, 4, 3)),
    ("decode", 2, "AMD"): (Tiles(16, 64, 1, 2), Tiles(16, 32, 1, 2), Tiles(16, 16, 1, 1)),
    ("decode", 4, 80): (Tiles(16, 32, 4, 3), Tiles(16, 32, 4, 3), Tiles(16, 64, 8, 1)),
    ("decode", 4, 90): (Tiles(16, 64, 4, 3), Tiles(16, 32, 4, 3), Tiles(16, 64, 8, 2)),
    ("decode", 4, 100): (Tiles(16, 64, 8, 2), Tiles(16, 32, 4, 3), Tiles(16, 64, 8, 2)),
    ("decode", 4, "AMD"): (Tiles(16, 32, 1, 2), Tiles(16, 16, 1, 2), Tiles(16, 16, 1, 1)),
    ("forward joined", 2, 80): (Tiles(32, 16, 4, 3), Tiles(16, 16, 8, 3), Tiles(16, 16, 8, 3)),
    ("forward joined", 2, 90): (Tiles(32, 16, 4, 3), Tiles(16, 16, 8, 3), Tiles(16, 16, 8, 3)),
    ("forward joined", 2, 100): (Tiles(32, 16, 4, 3), Tiles(16, 16, 8, 3), Tiles(16, 16, 8, 3)),
    ("forward joined", 2, "AMD"): (Tiles(32, 16, 4, 2), Tiles(16, 16, 4, 2), Tiles(16, 16, 4, 2)),
    ("query", 2, 80): (Tiles(64, 64, 4, 3), Tiles(32, 32, 4, 3), Tiles(16, 32, 4, 3)),
    ("query", 2, 90): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(16, 32, 4, 3)),
    ("query", 2, 100): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(16, 32, 4, 3)),
    ("query", 2, 120): (Tiles(64, 32, 4, 3), Tiles(32, 32, 4, 3), Tiles(16, 32, 4, 3)),
    ("query", 2, "AMD"): (Tiles(128, 32, 4, 2), Tiles(64, 16, 4, 2), Tiles(64, 16, 4, 1)),
    ("query", 4, 80): (Tiles(32, 32, 4, 3), Tiles(16, 32, 4, 2), Tiles(16, 64, 8, 1)),
    ("query", 4, 90): (Tiles(32, 32, 4, 3), Tiles(16, 32, 4, 2), Tiles(16, 64, 8, 1)),
    ("query", 4, 100): (Tiles(32, 32, 4, 3), Tiles(16, 32, 4, 2), Tiles(16, 64, 8, 1)),
    ("query", 4, "AMD"): (Tiles(64, 16, 4, 2), Tiles(64, 16, 4, 1), Tiles(64, 16, 4, 1)),
    ("query softcap", 2, 80): (Tiles(64, 64, 4, 3), Tiles(32, 32, 4, 3), Tiles(16, 32, 4, 3)),
    ("query softcap", 2, 90): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(16, 32, 4, 3)),
    ("query softcap", 2, 100): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(16, 32, 4, 3)),
    ("query softcap", 2, 120): (Tiles(64, 32, 4, 3), Tiles(32, 32, 4, 3), Tiles(16, 32, 4, 3)),
    ("query softcap", 2, "AMD"): (Tiles(128, 32, 4, 2), Tiles(64, 16, 4, 2), Tiles(64, 16, 4, 1)),
    ("query softcap", 4, 80): (Tiles(32, 32, 4, 3), Tiles(16, 32, 4, 2), Tiles(16, 64, 8, 1)),
    ("query softcap", 4, 90): (Tiles(32, 32, 4, 3), Tiles(16, 32, 4, 2), Tiles(16, 64, 8, 1)),
    ("query softcap", 4, 100): (Tiles(32, 32, 4, 3), Tiles(16, 32, 4, 2), Tiles(16, 64, 8, 1)),
    ("query softcap", 4, "AMD"): (Tiles(64, 16, 4, 2), Tiles(64, 16, 4, 1), Tiles(64, 16, 4, 1)),
    ("query joined", 2, 80): (Tiles(32, 16, 8, 3), Tiles(16, 16, 8, 3), Tiles(16, 16, 8, 3)),
    ("query joined", 2, 90): (Tiles(32, 16, 8, 3), Tiles(16, 16, 8, 3), Tiles(16, 16, 8, 3)),
    ("query joined", 2, 100): (Tiles(32, 16, 8, 3), Tiles(16, 16, 8, 3), Tiles(16, 16, 8, 3)),
    ("query joined", 2, "AMD"): (Tiles(32, 16, 4, 2), Tiles(16, 16, 4, 2), Tiles(16, 16, 4, 2)),
    ("key", 2, 80): (Tiles(32, 64, 4, 3), Tiles(32, 64, 4, 3), Tiles(32, 16, 4, 2)),
    ("key", 2, 90): (Tiles(64, 128, 8, 3), Tiles(32, 128, 8, 3), Tiles(64, 32, 8, 3)),
    ("key", 2, 100): (Tiles(64, 128, 8, 3), Tiles(64, 128, 8, 3), Tiles(64, 32, 8, 3)),
    ("key", 2, "AMD"): (Tiles(32, 128, 4, 2), Tiles(32, 128, 4, 1), Tiles(16, 64, 4, 1)),
    ("key", 4, 80): (Tiles(32, 32, 4, 3), Tiles(32, 16, 4, 3), Tiles(64, 16, 8, 1)),
    ("key", 4, 90): (Tiles(32, 32, 4, 3), Tiles(32, 16, 4, 3), Tiles(64, 16, 8, 1)),
    ("key", 4, 100): (Tiles(32, 32, 4, 3), Tiles(32, 16, 4, 3), Tiles(64, 16, 8, 1)),
    ("key", 4, 120): (Tiles(32, 32, 4, 3), Tiles(64, 16, 8, 1), Tiles(64, 16, 8, 1)),
    ("key", 4, "AMD"): (Tiles(32, 128, 4, 1), Tiles(16, 64, 4, 1), Tiles(16, 64, 4, 1)),
    ("key softcap", 2, 80): (Tiles(32, 64, 4, 3), Tiles(32, 64, 4, 3), Tiles(32, 16, 4, 2)),
    ("key softcap", 2, 90): (Tiles(64, 128, 8, 3), Tiles(32, 128, 8, 3), Tiles(64, 32, 8, 3)),
    ("key softcap", 2, 100): (Tiles(64, 128, 8, 3), Tiles(32, 128, 8, 3), Tiles(64, 32, 8, 3)),
    ("key softcap", 2, "AMD"): (Tiles(32, 128, 4, 2), Tiles(32, 128, 4, 1), Tiles(16, 64, 4, 1)),
    ("key softcap", 4, 80): (Tiles(32, 32, 4, 3), Tiles(32, 16, 4, 3), Tiles(64, 16, 8, 1)),
    ("key softcap", 4, 90): (Tiles(32, 32, 4, 3), Tiles(32, 16, 4, 3), Tiles(64, 16, 8, 1)),
    ("key softcap", 4, 100): (Tiles(32, 32, 4, 3), Tiles(32, 16, 4, 3), Tiles(64, 16, 8, 1)),
    ("key softcap", 4, "AMD"): (Tiles(32, 128, 4, 1), Tiles(16, 64, 4, 1), Tiles(16, 64, 4, 1)),
}


def block_d(head_dim: int) -> int:
    """Columns of a tile: the head dimension rounded up to a power of two that tile products accept."""
    return max(16, triton.next_power_of_2(head_dim))


class MeasuredTiles(TypedDict):
    """An entry of measured_tiles.json: the fastest tiles for head dimensions up to `head_dim` on one GPU."""

    kernel: str
    bytes: Literal[2, 4]  # of an element
    capability: int  # 90 for 9.0
    head_dim: Literal[64, 128, 256]
    block_m: Literal[16, 32, 64, 128, 256]
    block_n: Literal[16, 32, 64, 128, 256]
    num_warps: Literal[1, 2, 4, 8, 16]
    num_stages: Literal[1, 2, 3, 4, 5, 6]
    device: str
    triton: str


@cache
def measured_tiles() -> dict[tuple[str, int, int | str, int], Tiles]:
    """Measured tiles by (kernel, bytes of an element, compute capability, largest head dimension).

    Raises:
        OSError: the file that VALM_KERNELS_TILES names cannot be read.
        ValueError: the file is not JSON, or has another form; the message names it.
    """
    named = os.environ.get("VALM_KERNELS_TILES")
    path = Path(named) if named else Path(__file__).with_name("measured_tiles.json")
    if not named and not path.exists():
        return {}
    entries: list[MeasuredTiles] = read_measured(path, MeasuredTiles)
    return {
        (entry["kernel"], entry["bytes"], entry["capability"], entry["head_dim"]): Tiles(
            entry["block_m"], entry["block_n"], entry["num_warps"], entry["num_stages"]
        )
        for entry in entries
    }


@cache
def tiles_for(kernel: str, arch: int | str, head_dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles of `kernel`, a name in the table, for an architecture as `launch.architecture` returns it."""
    family: int | str
    if isinstance(arch, str):
        family = "AMD"
    elif 90 <= arch < 100:
        family = 90
    elif 100 <= arch < 120:
        family = 100
    else:
        family = 120 if arch >= 120 and (kernel, dtype.itemsize, 120) in _TILES else 80
    wide = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    measured = measured_tiles().get((kernel, dtype.itemsize, arch, (64, 128, 256)[wide]))
    if measured is not None:
        return measured
    return _TILES[kernel, dtype.itemsize, family][wide]
