import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import conftest
from tests.bare_python import bare_python


class Item(NamedTuple):
    path: Path
    number: int

    def iter_markers(self, name: str) -> list[pytest.Mark]:
        return [pytest.mark.timeout(3600).mark] if self.number == LONG else []


LONG = 7


def is_long(item):
    return item.number == LONG


@pytest.fixture
def run_tests(tmp_path):
    """Runs pytest on modules of its own, below this project's conftest.py."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)

    def run(modules, *options, seed=""):
        for name, source in modules.items():
            (tmp_path / name).write_text(source)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, tmp_path]
        environment = os.environ | {"VALM_TEST_SEED": seed}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_an_event_loop_that_is_left_running_is_an_error(run_tests):
    leaves = """
import asyncio

def test_leaves_a_running_loop():
    asyncio._set_running_loop(asyncio.new_event_loop())
"""
    done = run_tests({"test_a.py": leaves})
    assert done.returncode == 1 and "1 passed, 1 error" in done.stdout
    done = run_tests({"test_a.py": "import asyncio\n\ndef test_ends_its_loop():\n    asyncio.run(asyncio.sleep(0))\n"})
    assert done.returncode == 0, done.stdout


def test_a_seed_orders_modules_and_the_tests_in_each(run_tests, monkeypatch):
    usual = [Item(Path(f"test_{module}.py"), number) for module in "abcdefgh" for number in range(20)]

    def order(seed):
        monkeypatch.setattr(conftest, "SEED", seed)
        tests = usual.copy()
        conftest.pytest_collection_modifyitems(tests)
        return tests

    first, second = order("1"), order("2")
    assert order(None) == [*filter(is_long, usual), *itertools.filterfalse(is_long, usual)]  # which are as they were
    assert usual != first != second and sorted(first) == sorted(second) == usual
    assert order("1") == first  # all workers of pytest-xdist must have one order
    modules = [path for path, _ in itertools.groupby(first, key=lambda test: test.path)]
    assert len(modules) == 8 and modules != sorted(modules)


@pytest.mark.slow
def test_pytest_runs_in_the_order_of_the_seed(run_tests):
    named = {f"test_{letter}.py": "def test(): pass\n" for letter in "abcdefgh"}
    done = run_tests(named, "--collect-only", seed="1")
    ran = [line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line]
    assert sorted(ran) == sorted(named) != ran


@pytest.mark.slow  # collects two thousand tests
def test_kernels_are_tested_without_what_a_machine_with_a_card_may_lack(tmp_path):
    """No plugin of pytest, no hypothesis, nothing of the model: every module is collected, and a skip says why."""
    root, python = Path(__file__).parents[1], bare_python(tmp_path / "bare")
    with_card = "import pytest, torch; torch.cuda.is_available = lambda: True; raise SystemExit(pytest.main())"
    collect = ["-q", "-p", "no:cacheprovider", "--collect-only", "tests/valm_kernels"]
    done = subprocess.run([python, "-c", with_card, *collect], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_gpu.py::test_agrees_with_float64_reference" in done.stdout
    file = "tests/valm_kernels/test_int8_rows.py"
    run = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs the package hypothesis" in done.stdout and "passed" in done.stdout
