"""Chooses the tiles of a kernel launch: from the table or, if tuning is on, the fastest of a few candidates.

With VALM_KERNELS_AUTOTUNE=1, set before Python starts, the first launch of each kind of call (`_kind`) measures the
candidates around the table's entry on its own tensors: a few seconds each, most of it compilation. The choice is cached
in Triton's cache folder (TRITON_CACHE_DIR) for later processes; changed kernels or another version of Triton are
measured again. Other tiles add in another order, so results are bit-identical only between runs with the same choice.
A CUDA graph must be captured after a first launch outside of it.

triton.autotune tunes one launch with fixed arguments. Here the number of splits and the size of the scratch tensors
depend on the tiles, so the whole launcher is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources, PTXASError

from ..inputs import Inputs, num_images
from .launch import architecture
from .tiles import Tiles, tiles_for

AUTOTUNE = os.environ.get("VALM_KERNELS_AUTOTUNE") == "1"
# Tile products take blocks from 16 on.
MIN_BLOCK, MAX_BLOCK = 16, 128
MIN_WARPS, MAX_WARPS = 4, 8
MAX_STAGES = 4

_chosen: dict[tuple[Any, ...], Tiles] = {}


def choose_tiles(kernel: str, inputs: Inputs, launch: Callable[[Tiles], Any]) -> Tiles:
    """Tiles for `kernel`, a name of the table in tiles.py, on the device of the inputs and for calls of their kind.

    `launch` runs the kernel with given tiles. Tuning calls it repeatedly, so it must not accumulate.
    """
    q = inputs.q
    arch = architecture(q.device)
    tiles = tiles_for(kernel, arch, q.shape[3], q.dtype)
    if not AUTOTUNE:
        return tiles
    key = (kernel, arch, *_kind(inputs))
    if key not in _chosen:
        with torch.cuda.device_of(q):
            _chosen[key] = _fastest(key, list(candidates(tiles)), launch)
    return _chosen[key]


def _kind(inputs: Inputs) -> tuple[Any, ...]:
    """What the fastest tiles depend on besides the kernel; lengths and the number of heads rounded to powers of two."""
    q, k = inputs.q, inputs.k
    device = torch.cuda.get_device_name(q.device) if q.device.type == "cuda" else q.device.type
    if inputs.image_k is None:
        layout = "none"
    elif inputs.image_index is None:
        layout = "dense"
    else:
        layout = "pooled by head" if inputs.by_head else "pooled"
    images = num_images(inputs)
    sizes = (triton.next_power_of_2(n) for n in (q.shape[0] * k.shape[1], q.shape[2], k.shape[2]))
    options = (inputs.image_q is not None, inputs.first_key is not None, inputs.softcap is not None, inputs.causal)
    return (device, q.dtype, q.shape[3], q.shape[1] // k.shape[1], *sizes, layout, images, *options)


def candidates(tiles: Tiles) -> Iterator[Tiles]:
    """The given tiles, and some near them.

    A block is halved or doubled alone and together with the warps: half of the rows by as many warps would be the same
    work done twice, and with half of the warps two such programs share a multiprocessor.
    """
    yield tiles
    for block, size in (("block_m", tiles.block_m), ("block_n", tiles.block_n)):
        for other, warps in ((size // 2, tiles.num_warps // 2), (size * 2, tiles.num_warps * 2)):
            if MIN_BLOCK <= other <= MAX_BLOCK:
                yield replace(tiles, **{block: other})
                if MIN_WARPS <= warps <= MAX_WARPS:
                    yield replace(tiles, **{block: other, "num_warps": warps})
    for stages in (tiles.num_stages - 1, tiles.num_stages + 1):
        if 1 <= stages <= MAX_STAGES:
            yield replace(tiles, num_stages=stages)


def _fastest(key: tuple[Any, ...], tiles: list[Tiles], launch: Callable[[Tiles], Any]) -> Tiles:
    """The fastest of the tiles; read from Triton's cache folder if measured before."""
    identity = "-".join(map(str, (triton.__version__, _source_hash(), *key, *tiles)))
    folder = get_cache_manager(hashlib.sha256(identity.encode()).hexdigest())
    name = f"visual_fusion_{key[0]}.tiles.json"
    known = folder.get_file(name)
    if known is not None:
        return Tiles(**json.loads(Path(known).read_text())["tiles"])
    milliseconds = [_measure(launch, candidate) for candidate in tiles]
    if min(milliseconds) == float("inf"):
        launch(tiles[0])  # raises what is wrong
    best = min(zip(milliseconds, tiles, strict=True), key=lambda pair: pair[0])[1]
    measured = [{**asdict(t), "milliseconds": ms} for t, ms in zip(tiles, milliseconds, strict=True)]
    folder.put(
        json.dumps({"key": list(map(str, key)), "tiles": asdict(best), "measured": measured}), name, binary=False
    )
    return best


def _measure(launch: Callable[[Tiles], Any], tiles: Tiles) -> float:
    """Median milliseconds of a launch; infinity where these tiles do not compile or do not fit the card."""
    try:
        return triton.testing.do_bench(lambda: launch(tiles), return_mode="median")
    # the compiler's passes report what they cannot do as a RuntimeError, as CUDA does want of memory
    except (OutOfResources, PTXASError, CompilationError, RuntimeError):
        return float("inf")


@cache
def _source_hash() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
