"""`make gpu-check`: everything that has to be seen once on a card, one step after the other, within ten minutes.

    python -m benchmarks.gpu_check            # a rerun repeats only what has not passed, or what the code has changed

A step is a command with a log under build/gpu-check/; what passed is noted beside the logs, with the card and the state
of the code. The rows of all benchmarks, and a row for each step, go into benchmarks/results/gpu.csv, from which
docs/results/gpu.md is written.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks import gpu_report
from benchmarks.conftest import Row, machine
from valm_kernels.atomic_files import atomic_path

ROOT = Path(__file__).parents[1]
STATE = ROOT / "build" / "gpu-check"
# Seconds of a run: what is left then is done by the next.
LIMIT_S = 600
SOURCES = ("valm_kernels", "csrc", "valm", "benchmarks", "tests")
SUFFIXES = {".py", ".cpp", ".hpp", ".cu", ".cuh", ".yaml"}
# An access beyond a tensor stays unseen in PyTorch's own memory pool, which CUDA graphs need.
SANITIZED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# The small set: each kind of attention in one dtype ("float16" alone is also in "bfloat16"), and the searches of the
# public functions.
SMALL = "(test_agrees_with_float64_reference and torch.float16) or test_public_functions or test_numpy_rows"


@dataclass(frozen=True)
class Step:
    """A command of gpu-check. `results`: whether it is a benchmark, which is given a file to write its rows to."""

    name: str
    command: tuple[str, ...]
    limit_s: int
    results: bool = False
    environment: tuple[tuple[str, str], ...] = ()

    def file(self, suffix: str) -> Path:
        """Its log, or its rows."""
        return STATE / f"{self.name.replace(' ', '-')}.{suffix}"


def pytest_step(name: str, *arguments: str, limit_s: int) -> Step:
    return Step(name, (sys.executable, "-m", "pytest", "-q", *arguments), limit_s)


def sanitizer_step(tool: str) -> Step:
    sanitizer = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all")
    tests = (sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "-k", SMALL, "tests/valm_kernels")
    return Step(tool, (*sanitizer, *tests), 90, environment=tuple(SANITIZED.items()))


def benchmark_step(name: str, file: str, *arguments: str, limit_s: int = 90) -> Step:
    pytest = (sys.executable, "-m", "pytest", "-q", f"benchmarks/{file}", "--benchmark-only", "--device", "cuda")
    return Step(name, (*pytest, *arguments), limit_s, results=True)


STEPS = (
    pytest_step("tests", "-m", "gpu", limit_s=180),
    *(sanitizer_step(tool) for tool in ("memcheck", "racecheck", "synccheck", "initcheck")),
    benchmark_step("attention", "valm_kernels/bench_visual_fusion.py", "-k", "bench_forward and bfloat16"),
    benchmark_step("long attention and decoding", "valm_kernels/bench_long_attention.py"),
    benchmark_step("top-K", "valm_kernels/bench_topk.py", "--full", "-k", "1000k and (64 or 512 or 4096)"),
    benchmark_step("context queries", "valm/bench_retrieval.py", "--full", "-k", "RN50x16-8-bfloat16"),
    benchmark_step("training step", "valm/bench_training.py"),
    benchmark_step("generation", "valm/bench_generation.py"),
)


@dataclass(frozen=True)
class Outcome:
    passed: bool
    seconds: float
    ended: str


def main(steps: Sequence[Step] = STEPS) -> int:
    """Runs the steps that have not passed yet, writes the CSV and the page; 1 if a step failed, else 0."""
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 1
    STATE.mkdir(parents=True, exist_ok=True)
    state = state_of_card_and_code()
    passed = passed_before(state)
    for step in steps:
        if step.name not in passed:  # its rows are of older code
            step.file("csv").unlink(missing_ok=True)
    end = time.monotonic() + LIMIT_S
    outcomes: dict[Step, Outcome] = {}
    for step in steps:
        if step.name in passed and (not step.results or step.file("csv").exists()):
            outcomes[step] = passed[step.name]
            print(f"{step.name}: passed before, in {outcomes[step].seconds:.0f} s")
            continue
        outcomes[step] = run(step, min(step.limit_s, end - time.monotonic()))
        if outcomes[step].passed:
            passed[step.name] = outcomes[step]
            note_passed(state, passed)
    write_results(outcomes)
    with atomic_path(gpu_report.PAGE) as partial:
        partial.write_text(gpu_report.page(), encoding="utf-8")
    print(f"written: {gpu_report.RESULTS}, {gpu_report.PAGE}")
    print(f"{sum(outcome.seconds for outcome in outcomes.values()):.0f} s in all")
    failed = [step for step, outcome in outcomes.items() if not outcome.passed]
    for step in failed:
        print(f"{step.name} {outcomes[step].ended}: see {step.file('log')}")
    return 1 if failed else 0


def run(step: Step, limit_s: float) -> Outcome:
    if limit_s <= 0:
        return Outcome(False, 0, f"not run: {LIMIT_S} s are over, run it again")
    print(f"{step.name}: {' '.join(step.command)}", flush=True)
    command = list(step.command)
    if step.results:
        command += ["--results", str(step.file("csv"))]
    start = time.monotonic()
    with step.file("log").open("w") as log:
        try:
            # a session of its own, so that the processes it starts end with it
            with subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **dict(step.environment)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process:
                try:
                    code = process.wait(limit_s)
                except BaseException:  # also Ctrl-C, which does not reach another session
                    os.killpg(process.pid, signal.SIGKILL)
                    raise
            ended = "passed" if code == 0 else f"failed with exit status {code}"
        except subprocess.TimeoutExpired:
            ended = f"failed: not done in {limit_s:.0f} s"
        except FileNotFoundError:
            ended = f"failed: {step.command[0]} is not installed"
    outcome = Outcome(ended == "passed", time.monotonic() - start, ended)
    print(f"{step.name}: {ended}, {outcome.seconds:.0f} s", flush=True)
    return outcome


def state_of_card_and_code() -> str:
    """A hash that changes with the card, with torch and with any source file: what has passed then counts no longer."""
    digest = hashlib.sha256(f"{torch.cuda.get_device_name()} {torch.__version__}".encode())
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def passed_before(state: str) -> dict[str, Outcome]:
    """The outcomes, by name of the step, that an earlier run noted in the same state."""
    try:
        noted = json.loads((STATE / "passed.json").read_text())
    except FileNotFoundError:
        return {}
    return {name: Outcome(**outcome) for name, outcome in noted["steps"].items()} if noted["state"] == state else {}


def note_passed(state: str, passed: dict[str, Outcome]) -> None:
    steps = {name: asdict(outcome) for name, outcome in passed.items()}
    with atomic_path(STATE / "passed.json") as partial:
        partial.write_text(json.dumps({"state": state, "steps": steps}))


def write_results(outcomes: dict[Step, Outcome]) -> None:
    """The rows of all benchmarks in one file, after a row for each step."""
    with atomic_path(gpu_report.RESULTS) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*(field.name for field in fields(Row)), "machine"])
        writer.writeheader()
        for step, outcome in outcomes.items():
            took = f"{outcome.seconds * 1e3:.4g}"
            row = {"group": gpu_report.STEPS, "name": step.name, "median_ms": took, "note": outcome.ended}
            writer.writerow({**row, "machine": machine()})
        for step in outcomes:
            if step.results and step.file("csv").exists():
                with step.file("csv").open(newline="") as rows:
                    writer.writerows(csv.DictReader(rows))


if __name__ == "__main__":
    sys.exit(main())
