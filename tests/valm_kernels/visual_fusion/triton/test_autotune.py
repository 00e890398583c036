"""The choice of tiles, with launches that are only counted; test_backward.py tunes the kernels themselves."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from valm_kernels.visual_fusion.inputs import Inputs
from valm_kernels.visual_fusion.triton import autotune
from valm_kernels.visual_fusion.triton.autotune import MAX_BLOCK, MAX_STAGES, MIN_BLOCK, candidates, choose_tiles
from valm_kernels.visual_fusion.triton.tiles import _TILES, Tiles, tiles_for

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


def call(head_dim=64, dtype=torch.float16, group=1, keys=1, images=0, pooled=False, **options):
    def zeros(*shape):
        return torch.zeros(*shape, head_dim, dtype=dtype)

    tensors = dict.fromkeys(Inputs._fields) | {"q": zeros(1, group, 1), "k": zeros(1, 1, keys), "v": zeros(1, 1, keys)}
    if images:
        tensors["image_k"] = tensors["image_v"] = zeros(1, 3) if pooled else zeros(1, 1, 1, images)
    if pooled:
        tensors["image_index"] = torch.zeros(1, 1, images, dtype=torch.int32)
    return Inputs(**(tensors | {"causal": True, "scale": 1.0} | options))


def test_table_unless_asked():
    def launch(tiles):
        raise AssertionError("launched without being asked to tune")

    assert not autotune.AUTOTUNE
    assert choose_tiles("key", call(), launch) == TABLE


@pytest.mark.parametrize("entry", _TILES, ids=str)
def test_candidates_are_few_and_near(entry):
    for tiles in _TILES[entry]:
        found = list(candidates(tiles))
        assert found[0] == tiles
        assert len(set(found)) == len(found) <= 9
        for other in found[1:]:
            assert MIN_BLOCK <= min(other.block_m, other.block_n) <= max(other.block_m, other.block_n) <= MAX_BLOCK
            assert other.num_warps in (tiles.num_warps, 4, 8) and 1 <= other.num_stages <= MAX_STAGES


def test_half_of_the_rows_is_tried_with_half_of_the_warps():
    """Two such programs share a multiprocessor, and no product is computed twice."""
    assert Tiles(64, 64, 4, 3) in candidates(tiles_for("forward", 90, 64, torch.float16))
    assert Tiles(64, 64, 4, 3) in candidates(tiles_for("query", 90, 64, torch.float16))
    assert Tiles(64, 64, 4, 3) in candidates(tiles_for("key", 90, 64, torch.float16))
    assert Tiles(128, 64, 8, 3) in candidates(tiles_for("query", 80, 64, torch.float16))


def test_fastest_candidate(tuning):
    chosen = choose_tiles("key", call(), tuning.append)
    assert tuning == list(candidates(TABLE))
    assert chosen.block_m == TABLE.block_m // 2
    assert choose_tiles("key", call(), tuning.append) == chosen
    assert len(tuning) == len(list(candidates(TABLE))), "measured twice in one process"


def test_candidates_that_do_not_fit_the_card_are_passed_over(tuning):
    errors = [OutOfResources(300_000, 232_448, "shared memory")]

    def launch(tiles):
        if tiles.block_m < TABLE.block_m:
            raise errors.pop()
        tuning.append(tiles)

    assert choose_tiles("key", call(), launch).block_m == TABLE.block_m


def test_choice_is_kept_on_disk(tuning, monkeypatch):
    chosen = choose_tiles("key", call(), tuning.append)
    tuning.clear()
    monkeypatch.setattr(autotune, "_chosen", {})  # another process
    assert choose_tiles("key", call(), tuning.append) == chosen
    assert not tuning
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setattr(autotune, "_source_hash", lambda: "other kernels")
    choose_tiles("key", call(), tuning.append)
    assert tuning


def test_each_kind_of_call_is_tuned_for_itself(tuning, monkeypatch):
    def measured(*arguments):
        tuning.clear()
        choose_tiles(*arguments, tuning.append)
        return bool(tuning)

    assert measured("key", call())
    assert not measured("key", call())
    assert measured("query", call())
    kinds = (
        {"head_dim": 80},
        {"dtype": torch.bfloat16},
        {"group": 2},
        {"keys": 64},
        {"images": 2},
        {"images": 4},
        {"images": 2, "pooled": True},
        {"first_key": torch.zeros(1, 1, dtype=torch.int32)},
        {"softcap": 2.0},
        {"causal": False},
    )
    assert all(measured("key", call(**kind)) for kind in kinds)
    assert not measured("key", call(keys=63))
    monkeypatch.setattr(autotune, "architecture", lambda _: 90)
    assert measured("key", call())


def test_error_of_all_candidates_is_raised(tuning):
    def launch(tiles):
        raise RuntimeError("PassManager::run failed")

    with pytest.raises(RuntimeError, match="PassManager"):
        choose_tiles("key", call(), launch)
