"""The body of each benchmark, once and at a tiny size: a row that nobody measures would rot."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks").glob("*/bench_*.py"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_body_runs(file, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", file, "--benchmark-disable", "--full", "--tiny"]
    for name, rows in (("rows", 100), ("queries", 64)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(rows).standard_normal((rows, 16), dtype=np.float32))
    done = subprocess.run(
        [*command, "--scratch", tmp_path, "--vectors", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
