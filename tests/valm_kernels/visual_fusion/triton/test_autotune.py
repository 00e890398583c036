"""The choice of tiles, with launches that are only counted; test_backward.py tunes the kernels themselves."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from valm_kernels.visual_fusion.triton import autotune
from valm_kernels.visual_fusion.triton.autotune import MAX_BLOCK, MAX_STAGES, candidates, choose_tiles
from valm_kernels.visual_fusion.triton.tiles import _TILES, tiles_for

KEY = ("key", 80, 64, torch.float16)  # 80 is what `architecture` says of a CPU tensor
TABLE = tiles_for(*KEY)


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """Tuning switched on, with nothing chosen yet; returns what was launched. A launch takes block_m milliseconds."""
    launched = []
    monkeypatch.setattr(autotune, "AUTOTUNE", True)
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def do_bench(function, return_mode):
        function()
        return launched[-1].block_m

    monkeypatch.setattr(autotune.triton.testing, "do_bench", do_bench)
    return launched


def q(head_dim=64, dtype=torch.float16):
    return torch.zeros(1, 1, 1, head_dim, dtype=dtype)


def test_table_unless_asked():
    def launch(tiles):
        raise AssertionError("launched without being asked to tune")

    assert not autotune.AUTOTUNE
    assert choose_tiles("key", q(), launch) == TABLE


@pytest.mark.parametrize("entry", _TILES, ids=str)
def test_candidates_are_few_and_differ_in_one_property(entry):
    for tiles in _TILES[entry]:
        found = list(candidates(tiles))
        assert found[0] == tiles
        assert len(set(found)) == len(found) <= 8
        for other in found[1:]:
            properties = zip(tiles.__dict__.values(), other.__dict__.values(), strict=True)
            assert sum(a != b for a, b in properties) == 1
            assert min(other.block_m, other.block_n) >= 16 and max(other.block_m, other.block_n) <= MAX_BLOCK
            assert other.num_warps in (4, 8) and 1 <= other.num_stages <= MAX_STAGES


def test_fastest_candidate(tuning):
    chosen = choose_tiles("key", q(), tuning.append)
    assert tuning == list(candidates(TABLE))
    assert chosen.block_m == TABLE.block_m // 2
    assert choose_tiles("key", q(), tuning.append) == chosen
    assert len(tuning) == len(list(candidates(TABLE))), "measured twice in one process"


def test_candidates_that_do_not_fit_the_card_are_passed_over(tuning):
    def launch(tiles):
        if tiles.block_m < TABLE.block_m:
            raise OutOfResources(300_000, 232_448, "shared memory")
        tuning.append(tiles)

    assert choose_tiles("key", q(), launch).block_m == TABLE.block_m


def test_choice_is_kept_on_disk(tuning, monkeypatch):
    chosen = choose_tiles("key", q(), tuning.append)
    tuning.clear()
    monkeypatch.setattr(autotune, "_chosen", {})  # another process
    assert choose_tiles("key", q(), tuning.append) == chosen
    assert not tuning
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setattr(autotune, "_source_hash", lambda: "other kernels")
    choose_tiles("key", q(), tuning.append)
    assert tuning


def test_each_kernel_architecture_head_dim_and_dtype_is_tuned_for_itself(tuning, monkeypatch):
    def measured(*arguments):
        tuning.clear()
        choose_tiles(*arguments, tuning.append)
        return bool(tuning)

    assert measured("key", q())
    assert not measured("key", q())
    assert measured("query", q())
    assert measured("key", q(head_dim=80))
    assert measured("key", q(dtype=torch.bfloat16))
    monkeypatch.setattr(autotune, "architecture", lambda _: 90)
    assert measured("key", q())
