"""Runs the tests of the Triton kernels under Triton's interpreter.

Triton decides on import whether its kernels are compiled or interpreted, so the interpreter needs a process of its own.
By hand:  TRITON_INTERPRET=1 pytest tests/valm_kernels/visual_fusion/triton/test_forward.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes for Linux only")

FOLDER = Path(__file__).parent


FILES = (
    "test_backward.py",
    "test_forward.py",
    "test_guarded_interpreter.py",
    "test_joined.py",
    "test_planted.py",
)


def run_interpreted(files: tuple[str, ...], marker: str) -> None:
    paths = [FOLDER / file for file in files]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marker, *paths],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[3],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout, run.stdout


@pytest.mark.timeout(1200)
def test_kernels_under_interpreter():
    run_interpreted(FILES, "not slow")


# Two processes, so that two cores share the minutes.
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("files", [FILES[:1], FILES[1:]], ids=["backward", "the others"])
def test_kernels_under_interpreter_on_all_problems(files):
    run_interpreted(files, "slow")
