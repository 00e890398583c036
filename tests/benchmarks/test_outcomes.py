"""The plugin of gpu-check, on small tests of its own."""

import errno
import subprocess
import sys
from subprocess import PIPE

import pytest

from benchmarks import outcomes
from benchmarks.outcomes import Ended

pytest_plugins = "pytester"
TESTS = """
import os
import pytest

def test_a(): pass
def test_b(): assert 1 == 2, "not equal"
def test_c(): pytest.skip("no such thing")
def test_d():
    if os.environ.get("DIES"):
        raise KeyboardInterrupt
def test_e(): pass
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs pytest with the plugin on TESTS; returns its exit status and how the tests ended by their names."""
    pytester.makepyfile(test_small=TESTS)

    def run(*options, dies=""):
        monkeypatch.setenv("DIES", dies)
        arguments = ("-p", "benchmarks.outcomes", "--outcomes", "ended.csv", *options)
        done = pytester.runpytest_inprocess(*arguments, no_reraise_ctrlc=True)
        ended = outcomes.read(pytester.path / "ended.csv").values()
        return done.ret, {test.test.rpartition("_")[2]: test for test in ended}

    return run


def test_each_test_is_noted_and_passed_ones_are_not_run_again(run):
    code, ended = run("--run-number", "1")
    assert code == 1
    expected = {"a": "passed", "b": "failed", "c": "skipped", "d": "passed", "e": "passed"}
    assert {name: test.outcome for name, test in ended.items()} == expected
    assert ended["b"].note.startswith("AssertionError: not equal") and ended["c"].note == "no such thing"
    code, ended = run("--run-number", "2")
    assert code == 1
    assert [name for name, test in ended.items() if test.run == 2] == ["b", "c"]


def test_what_died_goes_on_with_the_next_test_and_is_tried_again_in_the_next_run(run):
    code, ended = run("--run-number", "1", dies="1")
    assert code == pytest.ExitCode.INTERRUPTED and ended["d"].outcome == outcomes.STARTED and "e" not in ended
    code, ended = run("--run-number", "1", dies="1")
    assert code == 0 and ended["d"].outcome == outcomes.STARTED and ended["e"].outcome == outcomes.PASSED
    code, ended = run("--run-number", "2")
    assert code == 1 and ended["d"].outcome == outcomes.PASSED


def test_what_hangs_comes_last_and_in_two_runs_at_the_most(run):
    code, ended = run("--run-number", "1", dies="1")
    assert code == pytest.ExitCode.INTERRUPTED and "e" not in ended
    code, ended = run("--run-number", "2", dies="1")
    assert code == pytest.ExitCode.INTERRUPTED and ended["e"].outcome == outcomes.PASSED
    code, ended = run("--run-number", "3", dies="1")
    assert code == 1  # of the test that fails
    assert ended["d"] == Ended(2, ended["d"].test, outcomes.STARTED) and ended["b"].run == 3


def test_processes_share_the_tests(run, pytester):
    """A test is not run while another process, which lives, has claimed it; and not after one that has run it ended."""
    # as `claim` does, without the time to import PyTorch
    claims = "from fcntl import *; lockf(file := open('ended.claims', 'ab'), LOCK_EX, 1, 1); print(); input()"
    other = subprocess.Popen([sys.executable, "-c", claims], stdin=PIPE, stdout=PIPE, text=True, cwd=pytester.path)
    other.stdout.readline()
    assert list(run("--shared")[1]) == ["a", "c", "d", "e"]
    other.communicate("\n")
    code, ended = run("--shared")
    assert code == 1 and ended["b"].outcome == outcomes.FAILED
    rows = [row.test for row in outcomes.read_rows(pytester.path / "ended.csv")]
    assert len(rows) == 2 * len(set(rows)) == 10  # each has begun and ended once


def test_a_file_system_without_locks_is_no_claim_of_another_process(monkeypatch, tmp_path):
    def lockf(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(outcomes.fcntl, "lockf", lockf)
    with pytest.raises(OSError, match="No locks available"):
        outcomes.claim(tmp_path / "ended.csv", 0)


def test_a_lost_gpu_ends_the_process(monkeypatch, tmp_path):
    """A failure after which torch.cuda.synchronize raises too, as after an illegal access."""

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    class Exited(BaseException):
        pass

    def leave(code):
        raise Exited(code)

    monkeypatch.setattr(outcomes.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(outcomes.torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(outcomes.os, "_exit", leave)
    notes = outcomes.Notes(tmp_path / "ended.csv", 3)

    def report(when, outcome):
        return pytest.TestReport("t::a", ("t", 1, "a"), {}, outcome, None, when, duration=0.5)

    notes.pytest_runtest_logstart("t::a")
    notes.pytest_runtest_logreport(report("call", "failed"))
    with pytest.raises(Exited, match=str(outcomes.DEVICE_LOST)):
        notes.pytest_runtest_logreport(report("teardown", "passed"))
    assert outcomes.read(tmp_path / "ended.csv") == {"t::a": Ended(3, "t::a", "failed", 0.5, "")}
    notes.pytest_runtest_logstart("t::b")
    notes.pytest_runtest_logreport(report("teardown", "passed"))  # which did not fail, so nothing is asked of the GPU
