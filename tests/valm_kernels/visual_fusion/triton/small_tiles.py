"""Small tiles for the interpreter, whose borders the problems cross, smaller problems, and the tests that are quick."""

from collections.abc import Collection, Iterable
from dataclasses import replace
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
    monkeypatch.setattr(backward_key, "SCAN", 16)
    monkeypatch.setattr(backward_pool, "SLOTS", 2)
    monkeypatch.setattr(forward, "multiprocessors", lambda _: 8)
    monkeypatch.setattr(forward, "MIN_KEYS_PER_SPLIT", 32)


def made_small(problem: Problem) -> Problem:
    """The problem with 20 queries where it has images, which fill a tile and begin another, and with half of the heads.

    The interpreter's time grows with the programs, and in a pool with each slot of each head of a group.
    """
    if problem.num_images and problem.num_queries > 1:
        problem = replace(problem, batch=min(problem.batch, 2), num_queries=min(problem.num_queries, 20))
    if problem.kv_heads % 2 == 0 and not problem.by_head:
        problem = replace(problem, query_heads=problem.query_heads // 2, kv_heads=problem.kv_heads // 2)
    return problem


def quick_or_slow(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """The names as parameters; all except the quick names are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
