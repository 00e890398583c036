"""The driver of `make gpu-check` and its page, with stand-ins for the card and for what the steps run."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_report, gpu_steps, outcomes
from benchmarks.conftest import COLUMNS
from benchmarks.gpu_check import main, read_steps, run_steps
from benchmarks.gpu_steps import Step, plan, slug
from benchmarks.outcomes import Ended
from benchmarks.valm_kernels import bench_long_attention
from benchmarks.valm_kernels.bench_long_attention import DECODING, SIZES, TEXT_ONLY
from benchmarks.valm_kernels.bench_visual_fusion import CASES
from tests.bare_python import bare_python, path_without
from tests.valm.killed import still_running
from valm_kernels import build_info

# In the place of what a step runs: notes its call, ends a test of flash attention and the test "b", adds a row to the
# file of --results, and writes tiles. Where it is told to die it does so in "b".
STAND_IN = """
import json, os, pathlib, sys

def value(option):
    return sys.argv[sys.argv.index(option) + 1] if option in sys.argv else None

def add(path, line, header):
    path = pathlib.Path(path)
    with path.open("a") as file:
        file.write(line if path.stat().st_size else header + line)

name, folder, dies = sys.argv[1:4]
called = pathlib.Path(folder, "calls.txt")
calls = called.read_text() if called.exists() else ""
with called.open("a") as file:
    measured = [pathlib.Path(os.environ[f"VALM_KERNELS_{what}"]) for what in ("TILES", "CROSSOVER")]
    file.write(f"{name} {','.join(path.stem for path in measured if path.name != NONE)}\\n")
first = name not in [line.rpartition(" ")[0] for line in calls.splitlines()]
if ended := value("--outcomes"):
    header = "run,test,outcome,seconds,note\\n"
    run = value("--run-number")
    if first:
        add(ended, f"{run},FLASH,passed,0.1,\\n", header)
    add(ended, f"{run},b,started,0,\\n", header)
if rows := value("--results"):
    row = ROW
    add(rows, ",".join(row.values()) % name + "\\n", ",".join(row) + "\\n")
if "measure" in sys.argv:
    pathlib.Path(folder, "tiles.json").write_text(TILES)
if "benchmarks.valm_kernels.measure_crossover" in sys.argv:
    pathlib.Path(folder, "crossover.json").write_text(CROSSOVER)
if dies == "always":
    os.kill(os.getpid(), 9)
if ended:
    add(ended, f"{run},b,passed,0.1,\\n", header)
"""
CARD = {"capability": 90, "head_dim": 64, "device": "a card", "triton": "3.6.0"}
TILES = [
    {"kernel": "forward", "bytes": 2, "ms": 0.04, "table_ms": 0.05}
    | {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 3}
    | CARD
]
CROSSOVER = [{"keys": 2048, "longest": 8192, "torch": "2.13.0"} | CARD]


def row_of(group, name, ms, gpu_ms, least):
    cells = {"group": group, "name": name, "median_ms": ms, "gpu_ms": gpu_ms, "arithmetic_ms": least, "peak_mb": 12.5}
    return {name: "" if cell is None else str(cell) for name, cell in (dict.fromkeys(COLUMNS) | cells).items()}


def command(code):
    return (sys.executable, "-c", code)


def stand_in(steps, folder, dies="never"):
    """The plan with STAND_IN in the place of every command."""
    code = STAND_IN.replace("ROW", repr(row_of("%s", "ours", 1, 0.5, 0.1) | {"machine": "a card"}))
    for name, entries in (("TILES", TILES), ("CROSSOVER", CROSSOVER)):
        code = code.replace(f"{name})", f"{json.dumps(entries)!r})")
    code = code.replace("NONE", repr(gpu_steps.NONE_MEASURED)).replace("FLASH", gpu_steps.FLASH_TESTS)
    start = (sys.executable, "-Sc", code)
    return [
        replace(step, commands=tuple((*start, step.name, str(folder), dies, *one) for one in step.commands))
        for step in steps
    ]


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A machine with an H100 and every program, a state of the code that tests can change, and files of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check, "number_of_processes", lambda: 2)
    monkeypatch.setattr(gpu_steps, "program", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_steps, "why_no_model", lambda: "transformers is 5.17, not >=5.24")
    monkeypatch.setattr(gpu_check, "machine", lambda: "a card; torch")
    monkeypatch.setattr(gpu_check, "state_of_card_and_code", lambda: (tmp_path / "code").read_text())
    monkeypatch.setattr(gpu_steps, "triton_cache", lambda: tmp_path / "triton")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "MEASURED_TILES", tmp_path / "measured_tiles.json")
    monkeypatch.setattr(gpu_check, "MEASURED_CROSSOVER", tmp_path / "measured_crossover.json")
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "gpu.csv")
    monkeypatch.setattr(gpu_report, "PAGE", Path(shutil.copy(gpu_report.PAGE, tmp_path)))
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    (tmp_path / "code").write_text("1")
    return tmp_path


@pytest.fixture
def check(card, monkeypatch):
    """Runs gpu-check with stand-ins for the commands, which may die; returns its exit status."""

    def check(dies="never", *arguments):
        steps = gpu_check.plan

        def planned(folder, *options, **run):
            return stand_in(steps(folder, *options, **run), folder, dies)

        with monkeypatch.context() as patched:
            patched.setattr(gpu_check, "plan", planned)
            return main(["--results", str(card / "results"), *arguments])

    return check


def rows():
    with gpu_report.RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def calls(folder):
    """The steps that were called and the tiles that they were given."""
    return [line.rpartition(" ")[::2] for line in (folder / "calls.txt").read_text().splitlines()]


MODEL = ("context queries", "training step", "generation")
BENCHMARKS = ("attention", "long attention and decoding", "top-K", "FlexAttention")


def test_the_whole_plan_runs_to_its_end(card, check, capfd):
    folder = card / "results" / "1"
    assert check() == 0
    ended = read_steps(folder)
    assert list(ended) == [step.name for step in plan(folder, 90, 2)]
    others = {name: outcome.outcome for name, outcome in ended.items() if outcome.outcome != "passed"}
    assert others == dict.fromkeys(MODEL, "skipped")
    called = calls(folder)
    assert [name for name, _ in called].count("tests") == 2 and [name for name, _ in called].count("sanitizers") == 2
    # what is measured is tested, and used once that has passed
    assert {name for name, used in called if used == "tiles"} == {gpu_steps.TESTS_OF_TILES, gpu_steps.CROSSOVER}
    assert {name for name, used in called if used == "tiles,crossover"} == {*BENCHMARKS, "sanitizers"}
    assert json.loads(gpu_check.MEASURED_TILES.read_text()) == TILES
    assert json.loads(gpu_check.MEASURED_CROSSOVER.read_text()) == CROSSOVER
    found = rows()
    assert [row["name"] for row in found] == [*ended, *["ours"] * len(BENCHMARKS)]
    assert [row["group"] for row in found[-len(BENCHMARKS) :]] == list(BENCHMARKS)
    page = gpu_report.PAGE.read_text()
    assert "Measured on a card; torch." in page
    assert "| generation | skipped: transformers is 5.17, not >=5.24 | 0 |" in page
    assert "| attention | ours | 1 | 0.5 | 1.00 | 0.1 | 5.00 | 12.5 |  |" in page
    out = capfd.readouterr().out
    assert "tests: passed in" in out and "written:" in out


@pytest.mark.slow
def test_a_rerun_builds_and_repeats_nothing_else(card, check, capfd):
    folder = card / "results" / "1"
    assert check() == 0
    first = calls(folder)
    assert check() == 0
    # what they make may be gone; the kernels are compiled in two processes
    assert [name for name, _ in calls(folder)[len(first) :]] == ["build", "compile tiles", "compile tiles"]
    assert "tests: passed before" in capfd.readouterr().out
    (card / "code").write_text("2")
    assert check() == 0
    assert calls(card / "results" / "2") == first


@pytest.mark.slow
def test_dies_in_every_step_and_resumes(card, check):
    """At once with the tests that are left; and in a second run with what has not passed."""
    folder = card / "results" / "1"
    assert check("always") == 1
    ended = read_steps(folder)
    assert {outcome.outcome for name, outcome in ended.items() if name not in MODEL} == {"failed"}
    assert "ended with exit status -9" in ended["build"].note
    assert "1 passed" in ended["tests"].note and "not ended: b" in ended["tests"].note
    assert not gpu_check.MEASURED_TILES.exists()  # as their tests have not passed
    assert check("never") == 0
    assert {outcome.outcome for name, outcome in read_steps(folder).items() if name not in MODEL} == {"passed"}
    assert len([row for row in rows() if row["group"] == "attention"]) == 1  # the last of each


def test_a_process_that_was_killed_is_started_again(card):
    begun, always = str(card / "begun"), "import os; os.kill(os.getpid(), 9)"
    once = f"import os\nif not os.path.exists({begun!r}):\n    open({begun!r}, 'w').close()\n    {always}"
    steps = [Step(name, 9, ((sys.executable, "-Sc", code),)) for name, code in (("once", once), ("always", always))]
    run_steps(steps, card, time.monotonic())
    assert [outcome.outcome for outcome in read_steps(card).values()] == ["passed", "failed"]
    assert "ended with exit status -9" in read_steps(card)["always"].note


@pytest.mark.slow
def test_results_that_were_brought_along(card, check, monkeypatch):
    """To a machine without a card: the repository's files are written from them."""
    assert check() == 0
    before = gpu_report.RESULTS.read_text()
    page = gpu_report.PAGE.read_text()
    gpu_report.PAGE.write_text(page.replace("| passed |", "| |"))
    for path in (gpu_report.RESULTS, gpu_check.MEASURED_TILES):
        path.unlink()
    others = [TILES[0] | {"capability": 80}, TILES[0] | {"head_dim": 128}]
    gpu_check.MEASURED_TILES.write_text(json.dumps([TILES[0] | {"num_warps": 8}, *others]))
    wider = CROSSOVER[0] | {"head_dim": 128, "keys": None}
    gpu_check.MEASURED_CROSSOVER.write_text(json.dumps([wider, CROSSOVER[0] | {"keys": 512}]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check("never", "--report") == 0
    assert gpu_report.RESULTS.read_text() == before and gpu_report.PAGE.read_text() == page
    assert json.loads(gpu_check.MEASURED_TILES.read_text()) == [*TILES, *others]
    assert json.loads(gpu_check.MEASURED_CROSSOVER.read_text()) == [wider, *CROSSOVER]


def test_other_code_has_results_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    states = set()
    for name, text in (("kernel.cu", "1"), ("kernel.cu", "2"), ("kernel.cu.orig", "1"), ("other.py", "1")):
        (tmp_path / "csrc" / name).write_text(text)
        states.add(gpu_check.state_of_card_and_code())
    assert len(states) == 3


@pytest.fixture
def steps_of_tiles(card):
    """Runs the tests of the measured tiles, and a benchmark after them, in the folder of the card; returns how often
    each has run. The tests note that they passed, or where `dies` names a file, that they began."""
    (card / gpu_steps.NONE_MEASURED).write_text("[]")
    ended, made, called = (card / name for name in ("ended.csv", "made.csv", "called"))
    code = (
        f"import os, pathlib; assert not pathlib.Path({str(ended)!r}).exists(); open({str(called)!r}, 'a').write('t'); "
        f"open({str(ended)!r}, 'w').write('run,test,outcome,seconds,note\\n1,a,passed,0,\\n'); "
        f"os.path.exists({str(card / 'fails')!r}) and os._exit(1)"
    )
    tests = Step(gpu_steps.TESTS_OF_TILES, 5, ((*command(code), "--outcomes", str(ended)),), tests=True)
    code = f"open({str(made)!r}, 'x').write('row'); open({str(called)!r}, 'a').write('b')"
    benchmark = Step("attention", 5, (command(code),), makes=(made,))

    def run(entries=None):
        if entries is not None:
            (card / "tiles.json").write_text(json.dumps(entries))
        run_steps([tests, benchmark], card, time.monotonic())
        return [called.read_text().count(which) for which in "tb"]

    return run


def test_a_step_is_run_again_where_what_it_is_given_has_changed(card, steps_of_tiles):
    """With all of its tests and rows; and tiles that no test has seen are not taken."""
    assert steps_of_tiles(TILES) == [1, 1] and gpu_check.tiles_passed(card)
    assert steps_of_tiles() == [1, 1]
    other = [TILES[0] | {"num_warps": 8}]
    (card / "tiles.json").write_text(json.dumps(other))
    assert not gpu_check.tiles_passed(card)
    assert steps_of_tiles() == [2, 2] and gpu_check.tiles_passed(card)


def test_a_benchmark_runs_again_once_its_tiles_are_taken(card, steps_of_tiles):
    (card / "fails").touch()
    assert steps_of_tiles(TILES) == [1, 1] and not gpu_check.tiles_passed(card)
    (card / "fails").unlink()
    (card / "ended.csv").unlink()
    assert steps_of_tiles() == [2, 2] and gpu_check.tiles_passed(card)


def test_tests_of_a_run_that_was_killed_count_for_their_own_tiles_alone(card, steps_of_tiles, monkeypatch):
    def killed(*arguments):
        (card / "ended.csv").write_text("run,test,outcome,seconds,note\n1,a,passed,0,\n")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gpu_check, "run_step", killed)
        (card / "tiles.json").write_text(json.dumps(TILES))
        with pytest.raises(KeyboardInterrupt):
            steps_of_tiles()
    assert read_steps(card)[gpu_steps.TESTS_OF_TILES].note == "was stopped"
    assert steps_of_tiles([TILES[0] | {"num_warps": 8}]) == [1, 1]


def test_a_crossover_is_not_taken_where_a_test_of_flash_attention_failed(card, check):
    folder = card / "results" / "1"
    assert check() == 0
    assert gpu_check.MEASURED_CROSSOVER.exists()
    gpu_check.MEASURED_CROSSOVER.unlink()
    failed = Ended(1, f"{gpu_steps.FLASH_TESTS}[dense]", "failed", 0.1, "other numbers")
    outcomes.write(folder / "tests.outcomes.csv", failed)
    assert check("never", "--report") == 0
    assert not gpu_check.MEASURED_CROSSOVER.exists() and gpu_check.MEASURED_TILES.exists()


def test_no_results_to_report(card, capfd):
    assert main(["--results", str(card / "nothing"), "--report"]) == 1
    assert "has no results of gpu-check: no steps.csv in a folder there" in capfd.readouterr().err


@pytest.mark.slow
def test_processes_of_a_step_end_with_it(card):
    started = card / "started"
    sleeper = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    starter = f"import subprocess, sys; subprocess.run([sys.executable, '-Sc', {sleeper!r}])"
    run_steps([Step("slow", 5, (command(starter),))], card, time.monotonic() - gpu_check.LIMIT_S + 5)
    assert still_running([int(started.read_text())]) == []


@pytest.mark.slow
def test_a_step_takes_what_those_before_have_left_and_no_more(card, monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMIT_S", 6)
    sleeper = "import time; time.sleep(60)"
    planned = (("quick", 2, "pass"), ("slow", 1, sleeper), ("last", 2, "pass"))
    run_steps([Step(name, budget, (command(code),)) for name, budget, code in planned], card, time.monotonic())
    assert [outcome.outcome for outcome in read_steps(card).values()] == ["passed", gpu_check.NOT_DONE, "passed"]
    assert re.fullmatch(r"stopped after [234] s", read_steps(card)["slow"].note)


def test_what_a_run_has_no_time_for_is_not_done_and_the_next_run_does_it(card, monkeypatch):
    """As on a machine of few cores, where the budgets do not fit in a run: the first steps run all the same."""
    sleeper = "import time; time.sleep(0 if SECOND else 60)"
    planned = (("first", 3, "pass"), ("second", 9, sleeper), ("third", 9, "pass"))

    def run(second, limit_s):
        monkeypatch.setattr(gpu_check, "LIMIT_S", limit_s)
        steps = [Step(name, s, (command(code.replace("SECOND", str(second))),)) for name, s, code in planned]
        run_steps(steps, card, time.monotonic())
        return [outcome.outcome for outcome in read_steps(card).values()]

    assert run(False, 4) == ["passed", gpu_check.NOT_DONE, gpu_check.NOT_DONE]
    assert read_steps(card)["third"].note == "4 s are over"
    assert run(True, 60) == ["passed"] * 3


def test_why_a_step_was_not_run(card, monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMIT_S", 6)
    sleeper = command("import time; time.sleep(60)")
    steps = [Step("absent", 2, (("no-such-sanitizer",),)), Step("skipped", 100, (sleeper,), skipped="no reason")]
    run_steps(steps, card, time.monotonic())
    ended = read_steps(card)
    assert [outcome.outcome for outcome in ended.values()] == ["failed", "skipped"]
    assert ended["absent"].note == "no-such-sanitizer is not installed"
    run_steps([Step("late", 1, (sleeper,))], card, time.monotonic() - 6)
    assert read_steps(card)["late"].note == "6 s are over"


FAIL_AND_SKIP = [("a", "passed", ""), ("b", "failed", "1 is not 2"), ("c", "skipped", "no faiss")]


@pytest.mark.parametrize(
    ("tests", "exits", "note"),
    [
        (FAIL_AND_SKIP, 0, "1 passed, 1 failed, 1 skipped"),
        # one that killed its process, also where the process that went on after it ended well
        ([("a", "passed", ""), ("b", outcomes.STARTED, "")], 0, "1 passed; not ended: b"),
        # none passed, as where the processes find no card, and skip all
        ([(test, "skipped", "needs a CUDA device") for test in "ab"], 5, "2 skipped; no test passed"),
        ([], 5, "no test passed"),
    ],
)
def test_a_step_of_tests_fails_unless_all_have_ended_well(card, tests, exits, note):
    path = card / f"{slug('some tests')}.outcomes.csv"
    for test, outcome, reason in tests:
        outcomes.write(path, Ended(1, test, outcome, 0.1, reason))
    once = (*command(f"import sys; sys.exit({exits})"), "--outcomes", str(path))
    run_steps([Step("some tests", 9, (once,), tests=True)], card, time.monotonic())
    assert read_steps(card)["some tests"].outcome == "failed"
    assert read_steps(card)["some tests"].note == note
    if tests is FAIL_AND_SKIP:
        reasons = ["some-tests: 1 failed: 1 is not 2", "some-tests: 1 skipped: no faiss"]
        assert gpu_check.why_skipped_or_failed(card) == reasons


def test_without_a_card_nothing_runs(card, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--results", str(card / "results")]) == 1
    assert "needs a CUDA device, and torch sees none here" in capfd.readouterr().err
    assert not (card / "results").exists() and not gpu_report.RESULTS.exists()


def test_budgets_fit_in_ten_minutes_on_16_cores_and_the_rest_of_8_is_named(card):
    steps = plan(card, 90, 16)
    assert sum(step.budget_s for step in steps) <= gpu_check.LIMIT_S < 600
    processes = {step.name: len(step.commands) for step in steps}
    assert [processes[name] for name in ("tests", gpu_steps.COMPILE_TILES, "sanitizers")] == [16, 16, 2]
    of_8 = plan(card, 90, 8)
    assert gpu_check.what_fits(of_8, 16) == gpu_check.what_fits(steps, 16)
    assert re.fullmatch(r"\d+ s of 560 s in a run; later runs do .*FlexAttention", gpu_check.what_fits(of_8, 8))


@pytest.mark.parametrize(
    ("version", "printed"), [((12, 9), "/ptxas is ptxas 12.9. Before 13.3, "), ((13, 4), "with ptxas 13.4, /ptxas\n")]
)
def test_the_ptxas_of_the_kernels_is_printed(monkeypatch, capsys, version, printed):
    for module in (gpu_check, build_info):
        monkeypatch.setattr(module, "ptxas", lambda arch: ("/ptxas", version))
    gpu_check.print_tools(90)
    assert printed in capsys.readouterr().out


def test_steps_name_files_and_options_that_exist(card):
    commands = [command for step in plan(card, 90, 1) for command in step.commands]
    named = [word for words in commands for word in words if word.startswith(("benchmarks/", "tests/", "setup.py"))]
    files = [word.partition("::")[0] for word in named]
    assert all((gpu_report.ROOT / file).exists() for file in files)
    assert sum("--results" in command for command in commands) == 7


@pytest.mark.slow  # another Python, which imports PyTorch again and again
def test_dry_run_on_a_machine_that_has_nothing_but_pytorch(tmp_path, monkeypatch):
    python = bare_python(tmp_path / "bare")
    monkeypatch.setenv("PATH", path_without(tmp_path / "bin", "ninja", "nvcc", "compute-sanitizer"))
    dry = [python, "-m", "benchmarks.gpu_check", "--dry-run"]
    done = subprocess.run(dry, cwd=gpu_report.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("pytest_timeout", "xdist", "pytest_benchmark", "hypothesis", "pybind11", "ninja", "faiss", "Triton"):
        assert f"missing: {name}: " in done.stdout
    assert "generation, 15 s, skipped: the package valm cannot run here: " in done.stdout
    budget, limit = map(int, re.search(r"16 processes: (\d+) s of (\d+) s in a run\n", done.stdout).groups())
    assert budget <= limit < 600


@pytest.mark.slow
def test_a_benchmark_resumes(tmp_path):
    """The command of a step itself, on the CPU: each row is written once, also if the run is stopped between them."""
    rows, ended = tmp_path / "rows.csv", tmp_path / "ended.csv"
    # pytest-benchmark measures nothing where it finds itself beside others
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}

    def run(number, only):
        (step,) = (step for step in plan(tmp_path, 90, 1) if step.name == "long attention and decoding")
        (command,) = step.commands
        changed = {"cuda": "cpu", str(gpu_steps.rows_of(tmp_path, step.name)): str(rows)}
        changed[str(tmp_path / f"{slug(step.name)}.outcomes.csv")] = str(ended)
        command = [changed.get(argument, argument) for argument in command]
        command[command.index("--run-number") + 1] = str(number)
        command += ["--tiny", "-k", only]
        done = subprocess.run(command, cwd=gpu_report.ROOT, env=alone, capture_output=True, text=True)
        assert done.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED), done.stdout + done.stderr
        with rows.open(newline="") as file:
            return [row["name"] for row in csv.DictReader(file)]

    assert run(1, "decode and ours") == ["ours"]
    assert run(2, "decode") == ["ours", TEXT_ONLY]  # ours only once


def test_model_needs_the_versions_that_valm_asks_for(monkeypatch):
    versions = {"transformers": "5.17.0", "open_clip_torch": "3.3.0"}
    monkeypatch.setattr(gpu_steps, "version", lambda name: versions.get(name, "1000"))
    assert gpu_steps.why_no_model() == "the package valm cannot run here: transformers is 5.17.0, not <5.25,>=5.24"


def test_a_model_package_that_cannot_be_imported_is_named(monkeypatch, tmp_path):
    (tmp_path / "open_clip.py").write_text("raise ImportError('libfoo.so is missing')")
    monkeypatch.setattr(gpu_steps, "version", lambda name: "5.24.0" if name == "transformers" else "1000")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpu_steps.why_no_model() == "the package valm cannot run here: ImportError: libfoo.so is missing"


def test_page_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "gpu.csv")
    page = gpu_report.page()
    assert "No GPU has run it yet" in page
    assert page.count(f"| {gpu_report.NOT_YET} |") == len(gpu_report.AIMS)


def test_page_compares_the_gpus_own_time(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "gpu.csv")
    forward = "forward B4 H12 T1024 K8 D64 bfloat16"
    outcomes.append_row(gpu_report.RESULTS, row_of(forward, "ours", 0.11, 0.05, 0.0376))
    outcomes.append_row(gpu_report.RESULTS, row_of(forward, TEXT_ONLY, 0.06, 0.02, 0.0075))
    outcomes.append_row(gpu_report.RESULTS, row_of(forward, "eager concat", 0.3, None, 0.0376))
    page = gpu_report.page()
    assert f"| {forward} | ours | 0.11 | 0.05 | 1.00 | 0.0376 | 1.33 | 12.5 |  |" in page
    assert "|  | text-only flash attention | 0.06 | 0.02 | 0.40 | 0.0075 | 2.67 | 12.5 |  |" in page
    assert "|  | eager concat | 0.3 |  |  | 0.0376 |  | 12.5 |  |" in page
    # 50 µs over 20 µs and 100.7 MB at 3.35 TB/s
    assert f"the images' bytes | 1.3 | {0.05 / (0.02 + 100.663296e6 / 3.35e9):.2f} |" in page
    assert page.count(gpu_report.NOT_YET) == 3  # the steps and the other aims


def test_aims_are_found_under_the_names_of_the_benchmarks():
    cases = [*(f"forward {case}" for case in CASES), f"forward {SIZES['cuda']}", f"decode {DECODING}"]
    names = ["ours", TEXT_ONLY, "flash + LSE merge"]
    rows = [{"group": case, "name": name, "median_ms": "1", "gpu_ms": "1"} for case in cases for name in names]
    assert all(aim.ratio(rows) is not None for aim in gpu_report.AIMS)


def test_arithmetic_of_decoding_without_images_is_less():
    measured = {}
    for name in ("ours", TEXT_ONLY):
        bench_long_attention.bench_decode(lambda name, **row: measured.update({name: row}), torch.device("cpu"), name)
    assert measured["ours"]["group"] == measured[TEXT_ONLY]["group"]
    assert measured[TEXT_ONLY]["arithmetic"] < measured["ours"]["arithmetic"]


@pytest.mark.slow  # a process that collects
def test_the_tests_that_the_sanitizers_watch_are_there():
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only", *gpu_steps.SANITIZED_TESTS]
    done = subprocess.run(collect, cwd=gpu_report.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert set(gpu_steps.SANITIZED_TESTS) <= set(done.stdout.splitlines())


def test_every_file_of_gpu_tests_is_named():
    """In tests/valm_kernels: valm has one test that needs faiss-gpu."""
    marked = re.compile(r"pytest\.mark\.gpu\b")
    files = (gpu_report.ROOT / "tests" / "valm_kernels").rglob("test_*.py")
    found = {str(file.relative_to(gpu_report.ROOT)) for file in files if marked.search(file.read_text())}
    assert found == {gpu_steps.ATTENTION_TESTS, gpu_steps.SEARCH_TESTS}
