"""Tiles for the interpreter, so small that the problems cross their borders, and the tests that are quick there."""

from collections.abc import Collection, Iterable
from types import ModuleType
from typing import Any

import pytest

from tests.valm_kernels.visual_fusion.problems import Problem
from valm_kernels.visual_fusion.triton import backward_key, backward_pool, forward, launch
from valm_kernels.visual_fusion.triton.tiles import Tiles


def use_small_tiles(
    monkeypatch: pytest.MonkeyPatch, problem: Problem, launch: ModuleType = launch, forward: ModuleType = forward
) -> None:
    """Gives every kernel tiles of about a third of the problem, and decoding splits of 32 keys.

    The modules are those of the kernels, for a copy of these.
    """
    block = 16 if problem.num_keys <= 48 else 32 if problem.num_keys <= 96 else 64
    monkeypatch.setattr(launch, "tiles_for", lambda *_: Tiles(block, block, num_warps=4, num_stages=2))
    monkeypatch.setattr(backward_key, "SCAN", 64)
    monkeypatch.setattr(backward_pool, "SLOTS", 2)
    monkeypatch.setattr(forward, "multiprocessors", lambda _: 8)
    monkeypatch.setattr(forward, "MIN_KEYS_PER_SPLIT", 32)


def quick_or_slow(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """The names as parameters; all except the quick names are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
