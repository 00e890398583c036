"""The body of each benchmark, once and at a tiny size: a row that nobody measures would rot."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks").glob("*/bench_*.py"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_body_runs(file, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", file, "--benchmark-disable", "--full", "--tiny"]
    done = subprocess.run([*command, "--scratch", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
