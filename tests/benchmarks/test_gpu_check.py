"""The driver of `make gpu-check` and its page, with stand-ins for the card and the steps."""

import csv
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch

from benchmarks import gpu_check, gpu_report
from benchmarks.conftest import Row
from benchmarks.gpu_check import Step, main
from benchmarks.valm_kernels import bench_long_attention
from benchmarks.valm_kernels.bench_long_attention import DECODING, SIZES, TEXT_ONLY
from benchmarks.valm_kernels.bench_visual_fusion import CASES

# A stand-in for a benchmark: writes a row to the file that --results names.
BENCHMARK = """
import csv, sys
row = {row!r}
with open(sys.argv[sys.argv.index("--results") + 1], "w", newline="") as file:
    writer = csv.DictWriter(file, row)
    writer.writeheader()
    writer.writerow(row)
"""


def command(code):
    return sys.executable, "-c", code


def counting(path, code=""):
    """A step's command that also counts its runs in a file."""
    return command(f"open({str(path)!r}, 'a').write('x')\n{code}")


def benchmark(group, name, ms, least):
    row = asdict(Row(group, name, ms, ms, 3, None, None, None, 12.5, least, 1.0, "")) | {"machine": "a card; torch"}
    return Step(f"benchmark {name}", command(BENCHMARK.format(row=row)), 60, True)


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A machine with a card, a state of the code that tests can change, and files of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(gpu_check, "machine", lambda: "a card; torch")
    monkeypatch.setattr(gpu_check, "STATE", tmp_path / "state")
    monkeypatch.setattr(gpu_check, "SOURCES", (str(tmp_path / "sources"),))
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "gpu.csv")
    monkeypatch.setattr(gpu_report, "PAGE", tmp_path / "gpu.md")
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "kernel.cu").write_text("1")
    return tmp_path


def rows():
    with gpu_report.RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_steps_run_and_one_file_has_their_rows(card, capfd):
    forward = "forward B4 H12 T1024 K8 D64 bfloat16"
    steps = [
        Step("tests", command("print('3 passed')"), 60),
        benchmark(forward, "ours", 0.05, 0.0376),
        benchmark(forward, "text-only flash attention", 0.02, 0.0075),
    ]
    assert main(steps) == 0
    found = rows()
    assert [row["name"] for row in found] == [*(step.name for step in steps), "ours", "text-only flash attention"]
    assert [row["note"] for row in found[:3]] == ["passed"] * 3
    assert {row["machine"] for row in found[:3]} == {"a card; torch"}
    assert found[3]["arithmetic_ms"] == "0.0376"
    assert "3 passed" in (card / "state" / "tests.log").read_text()
    page = gpu_report.PAGE.read_text()
    assert "Measured on a card; torch." in page
    assert f"| {forward} | ours | 0.05 | 1.00 | 0.0376 | 1.3 | 12.5 |  |" in page
    assert "|  | text-only flash attention | 0.02 | 1.00 | 0.0075 | 2.7 | 12.5 |  |" in page
    # 50 µs over 20 µs and 100.7 MB at 3.35 TB/s
    assert f"the images' bytes | 1.3 | {0.05 / (0.02 + 100.663296e6 / 3.35e9):.2f} |" in page
    assert page.count(gpu_report.NOT_YET) == 2  # the other aims
    assert "written:" in capfd.readouterr().out


def test_a_rerun_repeats_only_what_has_not_passed(card, capfd):
    runs = {name: card / name for name in ("first", "second", "third")}
    fixed = card / "fixed"
    steps = [
        Step("first", counting(runs["first"]), 60),
        Step("second", counting(runs["second"], f"import os, sys; sys.exit(not os.path.exists({str(fixed)!r}))"), 60),
        Step("third", counting(runs["third"]), 60),
    ]

    def counts():
        return [len(path.read_text()) for path in runs.values()]

    assert main(steps) == 1
    assert counts() == [1, 1, 1]  # a failure stops nothing
    assert "second failed with exit status 1: see " in capfd.readouterr().out
    assert "| second | failed with exit status 1 |" in gpu_report.PAGE.read_text()
    fixed.touch()
    assert main(steps) == 0
    assert counts() == [1, 2, 1]
    assert "first: passed before" in capfd.readouterr().out
    assert [row["note"] for row in rows()] == ["passed"] * 3
    (card / "sources" / "kernel.cu").write_text("2")
    assert main(steps) == 0
    assert counts() == [2, 3, 2]


def test_a_killed_run_keeps_what_has_passed(card):
    path = card / "first"

    class Killed(BaseException):
        pass

    def die():
        raise Killed

    steps = [Step("first", counting(path), 60), Step("second", counting(card / "second"), 60)]
    run = gpu_check.run
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(gpu_check, "run", lambda step, limit_s: run(step, 60) if step.name == "first" else die())
        main(steps)
    assert main(steps) == 0
    assert path.read_text() == "x"


def test_rows_that_are_gone_are_measured_again(card):
    step = benchmark("decode", "ours", 0.1, 0.0075)
    assert main([step]) == 0
    assert len(rows()) == 2
    step.file("csv").unlink()
    assert main([step]) == 0
    assert len(rows()) == 2


def test_rows_of_older_code_are_not_written(card, monkeypatch):
    step = benchmark("decode", "ours", 0.1, 0.0075)
    assert main([step]) == 0
    (card / "sources" / "kernel.cu").write_text("2")
    monkeypatch.setattr(gpu_check, "LIMIT_S", 0)
    assert main([step]) == 1
    assert [row["note"] for row in rows()] == ["not run: 0 s are over, run it again"]


def test_processes_of_a_step_end_with_it(card):
    started = card / "started"
    sleeper = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    starter = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    assert main([Step("slow", command(starter), 5)]) == 1
    pid = int(started.read_text())
    end = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < end:  # until the system has ended it
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_what_takes_too_long_or_is_not_installed_fails(card):
    steps = [
        Step("slow", command("import time; time.sleep(60)"), 1),
        Step("absent", ("no-such-sanitizer",), 60),
    ]
    assert main(steps) == 1
    assert [row["note"] for row in rows()] == ["failed: not done in 1 s", "failed: no-such-sanitizer is not installed"]


def test_what_ten_minutes_leave_is_done_by_the_next_run(card, monkeypatch):
    runs = card / "first", card / "second"
    slow = counting(runs[0], "import time; time.sleep(1)")
    steps = [Step("first", slow, 60), Step("second", counting(runs[1]), 60)]
    monkeypatch.setattr(gpu_check, "LIMIT_S", 0.5)
    assert main(steps) == 1
    assert [row["note"] for row in rows()] == ["failed: not done in 0 s", "not run: 0.5 s are over, run it again"]
    assert not runs[1].exists()
    monkeypatch.setattr(gpu_check, "LIMIT_S", 600)
    assert main(steps) == 0
    assert runs[1].read_text() == "x"


def test_without_a_card_nothing_runs(card, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([Step("first", counting(card / "first"), 60)]) == 1
    assert "needs a CUDA device, and torch sees none here" in capfd.readouterr().err
    assert not (card / "first").exists() and not gpu_report.RESULTS.exists()


def test_page_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "gpu.csv")
    page = gpu_report.page()
    assert "No card has run it yet: everything below is not measured yet" in page
    assert page.count(f"| {gpu_report.NOT_YET} |") == 2 + len(gpu_report.AIMS)


def test_aims_are_found_under_the_names_of_the_benchmarks():
    cases = [*(f"forward {case}" for case in CASES), f"forward {SIZES['cuda']}", f"decode {DECODING}"]
    names = ["ours", TEXT_ONLY, "flash + LSE merge"]
    rows = [{"group": case, "name": name, "median_ms": "1"} for case in cases for name in names]
    assert all(aim.ratio(rows) is not None for aim in gpu_report.AIMS)


def test_arithmetic_of_decoding_without_images_is_less():
    measured = {}
    for name in ("ours", TEXT_ONLY):
        bench_long_attention.bench_decode(lambda name, **row: measured.update({name: row}), torch.device("cpu"), name)
    assert measured["ours"]["group"] == measured[TEXT_ONLY]["group"]
    assert measured[TEXT_ONLY]["arithmetic"] < measured["ours"]["arithmetic"]


def test_steps_name_files_that_exist():
    assert [step.name for step in gpu_check.STEPS[1:5]] == ["memcheck", "racecheck", "synccheck", "initcheck"]
    for step in gpu_check.STEPS:
        files = [argument for argument in step.command if argument.startswith(("benchmarks/", "tests/"))]
        assert all((gpu_report.ROOT / file).exists() for file in files)
        assert step.results == bool([file for file in files if file.startswith("benchmarks/")])


def test_the_small_set_has_one_dtype_of_each_kind_of_attention():
    """The selection of the sanitizers' steps, as pytest collects it."""
    *_, folder = gpu_check.sanitizer_step("memcheck").command
    tests = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu and not slow", "-k", gpu_check.SMALL]
    files = [f"{folder}/visual_fusion/triton/test_gpu.py", f"{folder}/topk/test_cuda_gpu.py"]
    found = subprocess.run([*tests, *files], cwd=gpu_report.ROOT, capture_output=True, text=True).stdout
    selected = [line.rpartition("::")[2] for line in found.splitlines() if "::" in line]
    attention = [name for name in selected if name.startswith("test_agrees_with_float64_reference")]
    assert attention and all(name.endswith("torch.float16]") for name in attention)
    assert {"test_public_functions_use_it", "test_numpy_rows_on_a_device"} <= set(selected)
