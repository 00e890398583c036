"""setup.py builds with and without nvcc, and says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Build the extension into tmp_path, from this tree, under the given environment."""
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_cpu_only_build_has_no_cuda_code(tmp_path):
    done = build(tmp_path, VALM_KERNELS_CUDA="off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "building CPU code only" in done.stdout
    (module,) = (tmp_path / "lib" / "valm_kernels").glob("_native*.so")
    script = (
        "import importlib.util as u, torch; "
        f"s = u.spec_from_file_location('valm_kernels._native', {str(module)!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.built_with_cuda)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert loaded.stdout.strip() == "False", loaded.stderr


def test_cuda_on_without_nvcc_is_an_error(tmp_path):
    environment = {"VALM_KERNELS_CUDA": "on", "PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "CUDA_PATH": ""}
    done = build(tmp_path, **environment)
    assert done.returncode != 0
    assert "nvcc is neither on PATH nor under CUDA_HOME" in done.stderr


@pytest.mark.parametrize("choice", ["yes", ""])
def test_unknown_cuda_choice_is_an_error(tmp_path, choice):
    done = build(tmp_path, VALM_KERNELS_CUDA=choice)
    assert done.returncode != 0
    assert "must be auto, on or off" in done.stderr
