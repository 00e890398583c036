"""`make gpu-check`: everything that has to be seen once on a GPU, one step after the other, in runs of ten minutes.

    python -m benchmarks.gpu_check                    # a rerun does what has not passed, or all if the code has changed
    python -m benchmarks.gpu_check --results FOLDER   # goes on in a folder that was brought along
    python -m benchmarks.gpu_check --dry-run          # shows the plan, and what it compiles; needs no card
    python -m benchmarks.gpu_check --report           # writes the repository's files from the results; needs no card

It runs under the Python that is there, installs nothing and needs no network. A step is one or more processes side by
side, with logs in the folder of the results, build/gpu-check/ and in it one for each card and state of the code. Each
has a budget in seconds, and what the steps before it have left of theirs; then it is stopped and the next begins. On a
machine of few cores the last steps wait for the next run. What is measured is written at once, so that a run that was
killed goes on where it was; a step is run again where what it reads has changed. From the results come
benchmarks/results/gpu.csv, docs/results/gpu.md and, if the tests pass with them, the measured tiles of the Triton
kernels and the length from which on flash attention was faster. No step reads those that an earlier visit has left in
the package.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

try:
    import torch

    from benchmarks import gpu_report, outcomes
    from benchmarks.conftest import COLUMNS, machine
    from benchmarks.gpu_steps import (
        COMPILE_TILES,
        CROSSOVER,
        FLASH_TESTS,
        NONE_MEASURED,
        ROOT,
        TESTS_OF_TILES,
        TILES,
        WORK_S,
        Step,
        missing,
        outcome_files,
        plan,
        rows_of,
        search_path,
        shared_s,
        slug,
    )
    from valm_kernels.atomic_files import atomic_path
    from valm_kernels.build_info import ptxas, ptxas_risk
except ModuleNotFoundError as error:
    sys.exit(
        f"gpu-check needs the package {error.name}, which is not installed for {sys.executable}: "
        "pip install -e '.[gpu-check]'"
    )

RESULTS = ROOT / "build" / "gpu-check"
MEASURED_TILES = ROOT / "valm_kernels" / "visual_fusion" / "triton" / "measured_tiles.json"
MEASURED_CROSSOVER = ROOT / "valm_kernels" / "visual_fusion" / "measured_crossover.json"
# Seconds of a run: what is left then is done by the next. In ten minutes Python also starts and the summary is written.
LIMIT_S = 560
SOURCES = ("valm_kernels", "csrc", "valm", "benchmarks", "tests", "setup.py", "pyproject.toml")
SUFFIXES = {".py", ".cpp", ".hpp", ".cu", ".cuh", ".yaml", ".toml"}
GPU_BYTES_OF_A_PROCESS = 2 << 30
# A run's time is over before the end of a step, which the next run resumes.
NOT_DONE = "not done"
# How often a process that died is started again, which goes on with what is left.
RESTARTS = 20


@dataclass(frozen=True)
class Outcome:
    outcome: str  # "passed", "failed", "skipped" or NOT_DONE
    seconds: float
    note: str
    machine: str = ""
    given: str = ""  # hash of what it read


def tests_of(folder: Path, step: Step) -> list[outcomes.Ended]:
    """How the tests of a step ended."""
    return [ended for file in outcome_files(folder, step) for ended in outcomes.read(file).values()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the steps that have not passed yet and writes what follows; 1 if a step failed or is not done, else 0."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the results (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and what it compiles")
    parser.add_argument("--report", action="store_true", help="write the repository's files from the results")
    options = parser.parse_args(arguments)
    results = options.results.resolve()
    if options.report:
        found = list(results.glob("*/steps.csv"))
        if not found:
            print(f"{results} has no results of gpu-check: no steps.csv in a folder there", file=sys.stderr)
            return 1
        return finish(max(found, key=lambda path: path.stat().st_mtime).parent)
    if options.dry_run:
        return dry_run(results)
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device, and torch sees none here (--dry-run shows the plan)", file=sys.stderr)
        return 1
    folder = results / state_of_card_and_code()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NONE_MEASURED).write_text("[]")
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    print_tools(arch)
    # so that what it has started ends with it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu-check was told to end"))
    steps = plan(folder, arch, number_of_processes(), run=time.time_ns())
    run_steps(steps, folder, begun)
    return finish(folder)


def print_tools(arch: int) -> None:
    """Prints what is missing, and which ptxas compiles the kernels for a GPU of `arch`."""
    for name, text in missing().items():
        print(f"missing: {name}: {text}")
    with suppress(ImportError):  # without Triton
        path, version = ptxas(arch)
        print(ptxas_risk(arch) or f"Triton compiles with ptxas {'.'.join(map(str, version))}, {path}")


def number_of_processes() -> int:
    """As many as cores, of which each has some memory of the card."""
    cores = len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        return cores
    return max(1, min(cores, torch.cuda.get_device_properties(0).total_memory // GPU_BYTES_OF_A_PROCESS))


def state_of_card_and_code() -> str:
    """A hash that changes with the card, with torch and with any source file: what has passed then counts no longer."""
    digest = hashlib.sha256(f"{torch.cuda.get_device_name()} {torch.__version__}".encode())
    for source in SOURCES:
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in SUFFIXES:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def run_steps(steps: Sequence[Step], folder: Path, begun: float) -> None:
    """Runs what has not passed within LIMIT_S of `begun`, and notes each step as soon as it has ended."""
    end = begun + LIMIT_S
    before = read_steps(folder)

    def is_left(step: Step) -> bool:
        if step.skipped:
            return False
        ended = before.get(step.name)
        return step.always or ended is None or ended.outcome != "passed" or ended.given != given_to(step, folder)

    for number, step in enumerate(steps):
        if step.skipped:
            outcome = Outcome("skipped", 0, step.skipped)
        elif not is_left(step):
            print(f"{step.name}: passed before, in {before[step.name].seconds:.0f} s", flush=True)
            continue
        else:
            # its own budget, and what the steps before it have left of theirs
            later = sum(other.budget_s for other in steps[number + 1 :] if is_left(other))
            left = end - time.monotonic()
            limit = min(left, max(step.budget_s, left - later))
            given = given_to(step, folder)
            if step.name in before and before[step.name].given != given:
                for file in (*outcome_files(folder, step), *step.makes):
                    file.unlink(missing_ok=True)
            # noted first: a run that is killed in it leaves results of what was given
            note_step(folder, step.name, Outcome(NOT_DONE, 0, "was stopped", given=given))
            outcome = replace(run_step(step, folder, limit), given=given)
        note_step(folder, step.name, outcome)
        print(f"{step.name}: {outcome.outcome} in {outcome.seconds:.0f} s {outcome.note}".rstrip(), flush=True)


def given_to(step: Step, folder: Path) -> str:
    """A hash of what a step reads, and of the measured tiles and crossover with which it runs."""
    return hash_of(*step.reads, *map(Path, measured_for(step, folder).values()))


def hash_of(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files if file.exists())).hexdigest()[:16]


def run_step(step: Step, folder: Path, limit_s: float) -> Outcome:
    """Runs the commands of a step side by side, for `limit_s` seconds at the most."""
    if limit_s < 1:
        return Outcome(NOT_DONE, 0, f"{LIMIT_S} s are over")
    if step.name == TESTS_OF_TILES and not (folder / "tiles.json").exists():
        return Outcome("failed", 0, "no tiles were measured")
    print(f"{step.name}: {len(step.commands)} x {' '.join(step.commands[0])}, {limit_s:.0f} s", flush=True)
    environment = os.environ | {"PATH": search_path()} | dict(step.environment) | measured_for(step, folder)
    start = time.monotonic()
    processes: dict[int, subprocess.Popen[bytes]] = {}
    restarts: Counter[int] = Counter()
    failures: list[str] = []
    late = ""

    def log(number: int) -> Path:
        return folder / f"{slug(step.name)}{f'-{number}' if len(step.commands) > 1 else ''}.log"

    def launch(number: int) -> None:
        try:
            with log(number).open("ab") as file:
                # a session of its own, so that the processes it starts end with it
                processes[number] = subprocess.Popen(
                    step.commands[number],
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except FileNotFoundError:
            failures.append(f"{step.commands[number][0]} is not installed")

    try:
        for number in range(len(step.commands)):
            launch(number)
        while processes:
            for number, code in [(number, process.poll()) for number, process in processes.items()]:
                if code is None:
                    continue
                del processes[number]
                # a signal or DEVICE_LOST; 0 to 5 are pytest's own, of which the last is "no tests"
                if code not in range(6) and restarts[number] < RESTARTS:
                    restarts[number] += 1
                    launch(number)
                elif code and not (step.tests and code == 5):
                    which = f"process {number} " if len(step.commands) > 1 else ""
                    failures.append(f"{which}ended with exit status {code}")
                    if not step.tests:  # whose outcomes say more
                        print("\n".join(log(number).read_text(errors="replace").splitlines()[-5:]), flush=True)
            if time.monotonic() - start > limit_s:
                late = f"stopped after {limit_s:.0f} s"
                break
            time.sleep(0.02)
    finally:  # also after Ctrl-C, which does not reach another session
        for process in processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # one that a hanging driver keeps
                process.wait(5)
    seconds = time.monotonic() - start
    notes = [late, *failures[:3], f"{len(failures) - 3} more" if len(failures) > 3 else ""]
    failed = bool(failures)
    if step.tests:
        tests = tests_of(folder, step)
        counts = Counter(test.outcome for test in tests)
        begun = [test.test for test in tests if test.outcome == outcomes.STARTED]
        notes.insert(0, ", ".join(f"{count} {name}" for name, count in counts.items() if name != outcomes.STARTED))
        if begun:
            notes.append(f"not ended: {', '.join(begun[:3])}{', ...' if len(begun) > 3 else ''}")
        if not counts[outcomes.PASSED]:  # all skipped, as where a process finds no card
            notes.append("no test passed")
        failed = failed or bool(counts[outcomes.FAILED])
        failed = failed or (not late and bool(begun or not counts[outcomes.PASSED]))
    return Outcome("failed" if failed else NOT_DONE if late else "passed", seconds, "; ".join(filter(None, notes)))


def measured_for(step: Step, folder: Path) -> dict[str, str]:
    """The measured tiles for their tests, and after these have passed for what follows; and the measured crossover."""
    first = step.name in ("tests", COMPILE_TILES, TILES)
    tiles = step.name == TESTS_OF_TILES or (tiles_passed(folder) and not first)
    crossover = crossover_passed(folder) and not first and step.name not in (TESTS_OF_TILES, CROSSOVER)
    return {
        "VALM_KERNELS_TILES": str(folder / ("tiles.json" if tiles else NONE_MEASURED)),
        "VALM_KERNELS_CROSSOVER": str(folder / ("crossover.json" if crossover else NONE_MEASURED)),
    }


def tiles_passed(folder: Path) -> bool:
    """Whether the tests have passed with the tiles that are there now."""
    tests, tiles = read_steps(folder).get(TESTS_OF_TILES), folder / "tiles.json"
    given = hash_of(tiles, folder / NONE_MEASURED)
    return tests is not None and tests.outcome == "passed" and tiles.exists() and tests.given == given


def crossover_passed(folder: Path) -> bool:
    """Whether there is a measured crossover, and the tests of flash attention have passed, all of them."""
    steps = read_steps(folder)
    ended = any(steps[name].outcome == "passed" for name in ("tests", TESTS_OF_TILES) if name in steps)
    tests = outcomes.read(folder / f"{slug('tests')}.outcomes.csv").values()
    of_flash = {test.outcome for test in tests if FLASH_TESTS in test.test}
    return (folder / "crossover.json").exists() and ended and of_flash == {outcomes.PASSED}


def read_steps(folder: Path) -> dict[str, Outcome]:
    """The last outcome of each step."""
    path = folder / "steps.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            row["step"]: Outcome(row["outcome"], float(row["seconds"]), row["note"], row["machine"], row["given"])
            for row in csv.DictReader(file)
        }


def note_step(folder: Path, name: str, outcome: Outcome) -> None:
    row = {**asdict(outcome), "seconds": f"{outcome.seconds:.1f}", "machine": machine()}
    outcomes.append_row(folder / "steps.csv", {"step": name, **row})


def finish(folder: Path) -> int:
    """Writes the repository's files and the summary; 1 if a step failed or is not done, else 0."""
    ended = read_steps(folder)
    write_results(folder, ended)
    measured = (
        ("tiles.json", MEASURED_TILES, tiles_passed(folder)),
        ("crossover.json", MEASURED_CROSSOVER, crossover_passed(folder)),
    )
    for name, file, passed in measured:
        if passed:
            write_measured(folder / name, file)
            print(f"written: {file}")
    with atomic_path(gpu_report.PAGE) as partial:
        partial.write_text(gpu_report.page(), encoding="utf-8")
    print(f"written: {gpu_report.RESULTS}, {gpu_report.PAGE}\n")
    width = max(map(len, ended), default=0)
    for name, outcome in ended.items():
        print(f"{name:<{width}}  {outcome.outcome:<8}  {outcome.seconds:5.0f} s  {outcome.note}".rstrip())
    print(f"{'':<{width}}            {sum(outcome.seconds for outcome in ended.values()):5.0f} s in all")
    for line in why_skipped_or_failed(folder):
        print(line)
    failed, not_done = ([name for name in ended if ended[name].outcome == outcome] for outcome in ("failed", NOT_DONE))
    if failed:
        print(f"\nfailed: {', '.join(failed)}; the logs are in {folder}")
    if not_done:
        print(f"\nnot done: {', '.join(not_done)}; run gpu-check again, which resumes them")
    return 1 if failed or not_done else 0


def why_skipped_or_failed(folder: Path) -> list[str]:
    """The reasons in all steps, each once with the number of its tests."""
    lines = []
    for file in sorted(folder.glob("*.outcomes.csv")):
        tests = outcomes.read(file).values()
        for outcome in (outcomes.FAILED, outcomes.SKIPPED):
            reasons = Counter(test.note for test in tests if test.outcome == outcome)
            name = file.name.removesuffix(".outcomes.csv")
            lines += [f"{name}: {count} {outcome}: {reason}" for reason, count in reasons.items()]
    return lines


def write_results(folder: Path, ended: Mapping[str, Outcome]) -> None:
    """The rows of all benchmarks in one file, after a row for each step."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for path in filter(Path.exists, (rows_of(folder, name) for name in ended)):
        with path.open(newline="") as file:
            rows |= {(row["group"], row["name"]): row for row in csv.DictReader(file)}
    with atomic_path(gpu_report.RESULTS) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name, outcome in ended.items():
            note = f"{outcome.outcome}: {outcome.note}" if outcome.note else outcome.outcome
            took = f"{outcome.seconds * 1e3:.4g}"
            row = {"group": gpu_report.STEPS, "name": name, "median_ms": took, "note": note}
            writer.writerow({**row, "machine": outcome.machine})
        # the cases together, also where a second run added a row
        for group in dict.fromkeys(group for group, _ in rows):
            writer.writerows(row for (of, _), row in rows.items() if of == group)


def write_measured(new: Path, file: Path) -> None:
    """The measured entries in the package's file, in the place of those of the same kind that it has."""
    kinds = {}
    for source in (file, new):
        for entry in json.loads(source.read_text()) if source.exists() else []:
            kinds[tuple(entry.get(name) for name in ("capability", "kernel", "bytes", "head_dim"))] = entry
    with atomic_path(file) as partial:
        partial.write_text(json.dumps(list(kinds.values()), indent=1) + "\n")


def dry_run(folder: Path) -> int:
    """Prints the plan of a first run, and what of it fits in a run on this machine and on others."""
    arch, card = 90, "an H100, which is assumed: there is no card here"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        arch, card = 10 * major + minor, torch.cuda.get_device_name()
    processes = number_of_processes()
    print(f"{card}; {processes} processes; torch {torch.__version__}, Python {platform.python_version()}\n")
    print_tools(arch)
    steps = plan(folder, arch, processes)
    for step in steps:
        print(f"\n{step.name}, {step.budget_s} s{f', skipped: {step.skipped}' if step.skipped else ''}")
        variables = "".join(f"{name}={value} " for name, value in step.environment)
        print(f"  {len(step.commands)} x {variables}{' '.join(step.commands[0])}")
    print()
    for number in sorted({8, 16, processes}):
        print(f"{number} processes: {what_fits(steps, number)}")
    return 0


def what_fits(steps: Sequence[Step], processes: int) -> str:
    """The budgets of all steps with so many processes, and the steps that the first run does not finish."""
    planned = [step for step in steps if not step.skipped]
    budgets = [shared_s(step.name, processes) if step.name in WORK_S else step.budget_s for step in planned]
    late = [step.name for step, end in zip(planned, accumulate(budgets), strict=True) if end > LIMIT_S]
    return f"{sum(budgets)} s of {LIMIT_S} s in a run" + (f"; later runs do {', '.join(late)}" if late else "")


if __name__ == "__main__":
    sys.exit(main())
