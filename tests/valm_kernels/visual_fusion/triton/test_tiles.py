"""Which tiles a kernel is given: the table's, or those that a card has measured."""

import importlib.util
import json

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)

from valm_kernels.visual_fusion.triton import tiles
from valm_kernels.visual_fusion.triton.tiles import Tiles, tiles_for

ENTRY = {
    **{"kernel": "forward", "bytes": 2, "capability": 90, "head_dim": 128, "device": "a card", "triton": "3.6.0"},
    **{"block_m": 128, "block_n": 32, "num_warps": 4, "num_stages": 2},
}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Writes measured tiles to a file, which VALM_KERNELS_TILES then names."""

    def forget():
        tiles.measured_tiles.cache_clear()
        tiles.tiles_for.cache_clear()

    def write(*entries):
        path = tmp_path / "tiles.json"
        path.write_text(json.dumps(entries))
        monkeypatch.setenv("VALM_KERNELS_TILES", str(path))
        forget()

    forget()
    yield write
    forget()


def test_measured_tiles_take_the_place_of_the_tables_on_their_card_alone(measured):
    others = [("forward", 80, 128), ("forward", 100, 128), ("forward", 90, 64), ("query", 90, 128)]
    before = [tiles_for(*other, torch.float16) for other in others]
    wide = tiles_for("forward", 90, 128, torch.float32)
    measured(ENTRY)
    for head_dim in (72, 128):
        for dtype in (torch.float16, torch.bfloat16):
            assert tiles_for("forward", 90, head_dim, dtype) == Tiles(128, 32, 4, 2)
    assert [tiles_for(*other, torch.float16) for other in others] == before
    assert tiles_for("forward", 90, 128, torch.float32) == wide


def test_a_file_that_is_not_there(measured, monkeypatch, tmp_path):
    monkeypatch.setenv("VALM_KERNELS_TILES", str(tmp_path / "none.json"))
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        tiles_for("forward", 90, 128, torch.float16)


def test_a_file_of_another_form(measured):
    measured(ENTRY, ENTRY | {"block_m": 100})
    with pytest.raises(ValueError, match=r"tiles\.json: block_m of entry 1 must be .*16, 32, .* but is 100"):
        tiles_for("forward", 90, 128, torch.float16)


def test_blocks_are_powers_of_two_and_no_smaller_than_a_product():
    """Triton takes no others; tests/checks/triton compiles each."""
    for entry in tiles._TILES.values():
        for tile in entry:
            assert all(size >= 16 and size & (size - 1) == 0 for size in (tile.block_m, tile.block_n)), tile
            assert tile.num_warps & (tile.num_warps - 1) == 0, tile
