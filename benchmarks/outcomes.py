"""A pytest plugin for gpu-check: records the outcome of each test at once, and divides tests among processes.

    python -m pytest -p benchmarks.outcomes --outcomes FILE --run-number 2 --shared tests/valm_kernels

With --shared each process takes the next test that no other process has taken. Tests that passed before do not run
again. Neither do tests that an earlier process of this run has started, so after a process dies the next one continues
with the rest. A test that did not end in an earlier run comes last, and is skipped after two such runs. If the GPU
accepts no more work after an error, the process ends: every later test would fail.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO

import pytest
import torch

# Exit status: the process ended itself because the GPU accepts no more work from it.
DEVICE_LOST = 70
STARTED, PASSED, FAILED, SKIPPED = "started", "passed", "failed", "skipped"
# The number of runs in which a test that hangs may use up the time.
TRIES = 2
# The position of a test among all, which is the same in each process.
NUMBER = pytest.StashKey[int]()


@dataclass(frozen=True)
class Ended:
    """How a test ended, or that it started, which is what a process that dies leaves."""

    run: int
    test: str
    outcome: str
    seconds: float = 0
    note: str = ""


def read(path: Path) -> dict[str, Ended]:
    """The last known outcome of each test."""
    return {row.test: row for row in read_rows(path)}


def read_rows(path: Path) -> list[Ended]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Ended(int(row["run"]), row["test"], row["outcome"], float(row["seconds"]), row["note"])
            for row in csv.DictReader(file)
            if row["run"] != "run"  # two processes may both begin the file
        ]


def runs_without_end(path: Path) -> Counter[str]:
    """For each test, the number of runs in which it started and did not end."""
    last = {(row.run, row.test): row.outcome for row in read_rows(path)}
    return Counter(test for (_, test), outcome in last.items() if outcome == STARTED)


def write(path: Path, ended: Ended) -> None:
    append_row(path, asdict(ended))


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Adds a row to a CSV file and syncs it. Several processes may do so, because each row is one system call.

    Raises:
        ValueError: the file has other columns.
    """
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(row))
    if not path.exists() or not path.stat().st_size:
        writer.writeheader()
    else:
        with path.open(newline="") as file:
            columns = next(csv.reader(file))
        if columns != list(row):
            raise ValueError(f"{path} has other columns ({', '.join(columns)}): name another file")
    writer.writerow(row)
    with path.open("a", newline="") as file:
        file.write(lines.getvalue())
        file.flush()
        os.fsync(file.fileno())


def claim(path: Path, number: int) -> bool:
    """Whether this process is the only one to do part `number` of the work that `path` records.

    The system drops the claims of a process when it ends, also if it is killed.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.lockf(_claims(path.with_suffix(".claims")), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except (BlockingIOError, PermissionError):  # by another process
        return False
    return True


@cache  # closing it would drop the claims
def _claims(path: Path) -> IO[bytes]:
    return path.open("ab")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="the CSV file of how the tests ended")
    parser.addoption("--run-number", type=int, default=0, help="of gpu-check's run")
    parser.addoption("--shared", action="store_true", help="other processes run the same tests: each test runs in one")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for number, item in enumerate(items):
        item.stash[NUMBER] = number
    left = left_of(items, config)
    kept = {id(item) for item in left}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = left


def left_of(items: list[pytest.Item], config: pytest.Config) -> list[pytest.Item]:
    """The tests that are still to run: those that hung before come last."""
    path, run = config.getoption("--outcomes"), config.getoption("--run-number")
    known, hung = read(path), runs_without_end(path)

    def is_left(item: pytest.Item) -> bool:
        before = known.get(item.nodeid)
        if before is None:
            return True
        return before.outcome != PASSED and before.run != run and hung[item.nodeid] < TRIES

    # float32 first: Triton compiles it for longest, and no process should begin a long test when the others end
    return sorted(filter(is_left, items), key=lambda item: (hung[item.nodeid], "float32" not in item.nodeid))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With --shared, runs the tests that no other process takes. None: pytest runs all."""
    if not session.config.getoption("--shared") or session.config.option.collectonly:
        return None
    for item in session.items:
        # again what is left: a process that has ended holds no claims, and its tests have outcomes
        if claim(session.config.getoption("--outcomes"), item.stash[NUMBER]) and left_of([item], session.config):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
    return True


class Notes:
    """Writes the file during the run."""

    def __init__(self, path: Path, run: int) -> None:
        self.path, self.run = path, run
        self.failed = False

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.failed = False
        write(self.path, Ended(self.run, nodeid, STARTED))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != PASSED:
            write(self.path, Ended(self.run, report.nodeid, report.outcome, round(report.duration, 3), reason(report)))
        self.failed = self.failed or report.failed
        if report.when == "teardown" and self.failed and (error := lost_device()):
            print(f"\n{report.nodeid}: the GPU takes no more work from this process: {error}", flush=True)
            os._exit(DEVICE_LOST)
        if report.failed:
            print(f"\n{report.longreprtext}", flush=True)  # now, as the process may die before it ends


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Notes(config.getoption("--outcomes"), config.getoption("--run-number")))


def reason(report: pytest.TestReport) -> str:
    """Why a test was skipped or failed, on one line."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):
        text = report.longrepr[2].removeprefix("Skipped: ")
    else:
        text = getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longreprtext)
    return (text.strip().splitlines() or [""])[0][:300]


def lost_device() -> str | None:
    """The error of a GPU that accepts no more work; None if it does, or was never used."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
