"""What gpu-check compiles and measures for the table of tiles, without a card."""

import json
import os
import subprocess
import sys
from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch

from benchmarks.outcomes import DEVICE_LOST
from benchmarks.valm_kernels import compilations, tune_tiles
from benchmarks.valm_kernels.tune_tiles import (
    MAX_BLOCK,
    MAX_STAGES,
    MIN_BLOCK,
    Case,
    candidates,
    cases,
    compile_candidates,
    launches,
    measure,
    pairs,
    read_rows,
)
from tests.checks.triton import test_wgmma
from tests.checks.triton.compile_record import specialise
from tests.valm_kernels.visual_fusion.triton.test_gpu import LARGE, WITH_FLASH
from valm_kernels.visual_fusion.triton import tiles as tiles_module
from valm_kernels.visual_fusion.triton.tiles import _TILES, Tiles, tiles_for

CASE = Case(("query", "key"), torch.bfloat16, 64, 1, 2, 2, 128, 128, 2)


@pytest.fixture
def one_case(monkeypatch):
    monkeypatch.setattr(tune_tiles, "cases", lambda: [CASE])


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
    for kernel in ("forward", "query", "key"):
        assert Tiles(64, 64, 4, 3) in candidates(tiles_for(kernel, 90, 64, torch.float16))
    assert Tiles(128, 64, 8, 3) in candidates(tiles_for("query", 80, 64, torch.float16))


def test_every_entry_of_the_table_has_a_case():
    found = [(kernel, case.dtype.itemsize, case.head_dim) for case in cases() for kernel in case.kernels]
    assert len(found) == len(set(found))
    assert set(found) == {(kernel, size, dim) for kernel, size, _ in _TILES for dim in (64, 128, 256)}


def test_a_candidate_is_launched_with_its_tiles_and_nothing_else():
    for case in cases():
        if case.head_dim != 64:
            continue
        everything = [launch.kernel for launch in launches(case, 90, None, None)]
        for kernel in case.kernels:
            (launch,) = launches(case, 90, kernel, Tiles(32, 16, 4, 2))
            values = specialise(launch, 90).values
            assert (values["BLOCK_M"], values["BLOCK_N"]) == (32, 16) and launch.keywords["num_warps"] == 4
            assert launch.kernel in everything


# Under the interpreter, on small inputs in an element type that it multiplies.
INTERPRETED = """
import pathlib, sys
from dataclasses import replace
import torch
from benchmarks.valm_kernels import tune_tiles
from valm_kernels.visual_fusion.triton.tiles import Tiles

for case in tune_tiles.cases():
    if case.head_dim == 64:
        sizes = {"batch": 1, "heads": 2, "kv_heads": 2, "queries": min(case.queries, 20), "keys": 20, "images": 2}
        dtype = torch.float16 if case.dtype == torch.bfloat16 else case.dtype
        small = replace(case, dtype=dtype, **sizes)
        call = small.inputs("cpu")
        found, _ = tune_tiles.launchers(small, call, 80)
        for kernel in case.kernels:
            tiles = Tiles(16, 16, 4, 2)
            found[kernel](tiles)
            assert tune_tiles.agrees(pathlib.Path(sys.argv[1]), small, call, 80, kernel, tiles)
            print(kernel, case.dtype.itemsize)
"""


@pytest.mark.slow
def test_every_kernel_is_found_and_launched_again(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(tmp_path / "agreement.csv")]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len({(kernel, size) for kernel, size, _ in _TILES})


def test_candidates_that_the_compiler_cannot_compile_right(one_case, monkeypatch, tmp_path):
    compiled = []
    _, bad, killer, faulty, *good = pairs(CASE, 90)

    class Killed(BaseException):
        pass

    def compile_(source, target, options):
        if source == killer:
            raise Killed
        if source == bad:
            raise RuntimeError("PassManager::run failed\nmore")
        compiled.append(source)
        return SimpleNamespace(asm={"cubin": source})

    sass = {faulty: test_wgmma.CODE.replace(test_wgmma.WAIT, "NOP")}
    monkeypatch.setattr(tune_tiles, "cuobjdump", lambda option, source: sass.get(source, test_wgmma.CODE))
    monkeypatch.setattr(tune_tiles, "launches", lambda case, arch, *work: [work])
    monkeypatch.setattr(tune_tiles, "specialise", lambda work, arch: SimpleNamespace(source=work, options={}))
    monkeypatch.setattr(tune_tiles.triton, "compile", compile_)
    for _ in range(2):
        with pytest.raises(Killed):
            compile_candidates(tmp_path / "compiled.csv", 90)
    assert compiled == [(None, None)] * 2  # what the table's tiles launch
    compile_candidates(tmp_path / "compiled.csv", 90)
    compile_candidates(tmp_path / "compiled.csv", 90)
    tables = [(kernel, tiles_for(kernel, 90, 64, torch.bfloat16)) for kernel in CASE.kernels]
    assert [one for one in compiled if one[0]] == [one for one in (faulty, *good) if one not in tables]
    notes = {key[1:]: note for key, (_, note) in read_rows(tmp_path / "compiled.csv").items()}
    assert notes.pop((killer[0], *astuple(killer[1]))) == tune_tiles.BEGUN_AGAIN
    assert notes.pop((bad[0], *astuple(bad[1]))) == "does not compile: RuntimeError: PassManager::run failed"
    assert notes.pop((faulty[0], *astuple(faulty[1]))) == tune_tiles.REUSED
    assert set(notes.values()) == {tune_tiles.COMPILED}


def tiles_of(kernel):
    """The candidates of a kernel, the table's first."""
    return [tiles for name, tiles in pairs(CASE, 90) if name == kernel]


def measured(folder):
    """What `measure` writes of the candidates that were compiled in `folder`, by kernel; each has a time."""
    assert measure(folder, folder / "compiled.csv") == []
    return {entry["kernel"]: entry for entry in json.loads((folder / "tiles.json").read_text())}


@pytest.fixture
def card(one_case, monkeypatch, tmp_path):
    """A card on which a launch takes `times` milliseconds by kernel and tiles, or 1; every candidate is compiled."""
    times, launched = {}, []
    monkeypatch.setattr(tune_tiles, "architecture", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def do_bench(function, **options):
        function()
        time = times.get(launched[-1], 1.0)
        if isinstance(time, Exception):
            raise time
        return time

    def launchers(case, inputs, arch):
        found = {kernel: lambda tiles, kernel=kernel: launched.append((kernel, tiles)) for kernel in case.kernels}
        return found, ""

    monkeypatch.setattr(tune_tiles.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(tune_tiles, "launchers", launchers)
    monkeypatch.setattr(Case, "inputs", lambda case, device: None)
    monkeypatch.setattr(Case, "run", lambda case, inputs: [torch.ones(2)])
    for kernel, tiles in pairs(CASE, 90):
        tune_tiles.write_row(tmp_path / "compiled.csv", CASE, kernel, tiles, None, tune_tiles.COMPILED)
    return times, launched


def test_the_fastest_tiles_are_those_that_kernels_take(card, monkeypatch, tmp_path):
    times, launched = card
    of_query, of_key = map(tiles_of, ("query", "key"))
    times |= {("query", of_query[2]): 0.8, ("query", of_query[1]): RuntimeError("out of resources")}
    times["key", of_key[1]] = 0.98
    entry = measured(tmp_path)["query"]
    assert launched == pairs(CASE, 90)
    monkeypatch.setenv("VALM_KERNELS_TILES", str(tmp_path / "tiles.json"))
    tiles_module.measured_tiles.cache_clear()
    try:
        found = tiles_module.measured_tiles()
    finally:
        tiles_module.measured_tiles.cache_clear()
    # a gain of 2 % may be chance
    assert found == {("query", 2, 90, 64): of_query[2], ("key", 2, 90, 64): of_key[0]}
    assert (entry["ms"], entry["table_ms"], entry["candidates"]) == (0.8, 1.0, len(of_query) - 1)
    measured(tmp_path)
    assert launched[len(pairs(CASE, 90)) :] == [("query", of_query[1])]  # which failed, once more
    measured(tmp_path)
    assert len(launched) == len(pairs(CASE, 90)) + 1


def test_an_entry_without_a_time_ends_in_an_error(card, monkeypatch, tmp_path, capsys):
    times, _ = card
    times |= {pair: RuntimeError("CUDA out of memory") for pair in pairs(CASE, 90) if pair[0] == "key"}
    monkeypatch.setattr("sys.argv", ["tune_tiles", "measure", str(tmp_path / "compiled.csv"), str(tmp_path)])
    with pytest.raises(SystemExit, match=r"have no time:\nkey, .*: does not run: RuntimeError: CUDA out of memory"):
        tune_tiles.main()
    assert [entry["kernel"] for entry in json.loads((tmp_path / "tiles.json").read_text())] == ["query"]
    times |= {pair: RuntimeError("CUDA out of memory") for pair in pairs(CASE, 90)}
    (tmp_path / "candidates.csv").unlink()
    (tmp_path / "tiles.json").unlink()
    with pytest.raises(SystemExit, match="have no time"):
        tune_tiles.main()
    assert not (tmp_path / "tiles.json").exists()


def test_an_error_of_the_card_while_results_are_compared(card, monkeypatch, tmp_path):
    """Those tiles are not taken, and the next process goes on."""
    times, _ = card
    _, bad, second, *_ = tiles_of("query")
    times |= {("query", bad): 0.5, ("query", second): 0.8}
    lost = []

    def are_close(*results):
        best = read_rows(tmp_path / "agreement.csv").keys() & {tune_tiles.key(CASE, "query", bad)}
        if best and not lost:
            lost.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return True

    def synchronize():
        if lost == [True]:
            lost.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tune_tiles, "are_close", are_close)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measured(tmp_path)
    assert measured(tmp_path)["query"]["ms"] == 0.8


def test_tiles_whose_comparison_ends_no_process_are_given_up(card, monkeypatch, tmp_path):
    times, _ = card
    hangs = tiles_of("query")[1]
    times[("query", hangs)] = 0.5
    begun = []

    def are_close(*results):
        if tune_tiles.key(CASE, "query", hangs) in read_rows(tmp_path / "agreement.csv") and len(begun) < 2:
            begun.append(True)
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(tune_tiles, "are_close", are_close)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measured(tmp_path)
    assert measured(tmp_path)["query"]["ms"] == 1.0


def test_the_tests_for_a_card_launch_every_entry_of_the_table(monkeypatch):
    """Those that gpu-check runs with the measured tiles, so that none is taken untested."""
    found = set()

    def choose(kernel, inputs):
        found.add((kernel, inputs.q.dtype.itemsize, min(dim for dim in (64, 128, 256) if inputs.q.shape[3] <= dim)))
        return tiles_for(kernel, 90, inputs.q.shape[3], inputs.q.dtype)

    with tune_tiles.chosen(choose):
        for name, problem in LARGE.items():
            for dtype in (torch.bfloat16, torch.float32):
                list(compilations.launches(problem, dtype))
                if name in WITH_FLASH and dtype == torch.bfloat16:
                    list(compilations.launches(problem, dtype, with_lse=False, flash=True))
    assert found == {(kernel, size, dim) for kernel, size, _ in _TILES for dim in (64, 128, 256)}


def test_tiles_with_other_results_are_not_taken(card, monkeypatch, tmp_path):
    times, _ = card
    table, wrong, second, *_ = tiles_of("query")
    times |= {("query", wrong): 0.5, ("query", second): 0.8}

    def run(case, inputs):
        tiles = tune_tiles.backward_query.choose_tiles("query", inputs)
        return [torch.ones(2), torch.tensor([1.0, 1.04 if tiles == wrong else 1.0 if tiles == table else 1.02])]

    monkeypatch.setattr(Case, "run", run)
    entry = measured(tmp_path)["query"]
    assert (entry["ms"], entry["block_m"], entry["block_n"]) == (0.8, second.block_m, second.block_n)
    assert "other results" in read_rows(tmp_path / "candidates.csv")[tune_tiles.key(CASE, "query", wrong)][1]


def test_a_lost_card_ends_the_process_and_the_next_goes_on(card, monkeypatch, tmp_path):
    _, launched = card
    third = pairs(CASE, 90)[2]

    def synchronize():
        if launched[-1] == third:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr("sys.argv", ["tune_tiles", "measure", str(tmp_path / "compiled.csv"), str(tmp_path)])
    with pytest.raises(SystemExit) as raised:
        tune_tiles.main()
    assert raised.value.code == DEVICE_LOST
    tune_tiles.main()
    assert launched == pairs(CASE, 90)


def test_only_what_was_compiled_is_measured(card, tmp_path):
    _, launched = card
    (tmp_path / "compiled.csv").unlink()
    measured(tmp_path)
    assert launched == [(kernel, tiles_for(kernel, 90, 64, torch.bfloat16)) for kernel in ("query", "key")]
