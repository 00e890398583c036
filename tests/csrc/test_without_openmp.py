"""The native CPU code as a compiler without OpenMP builds it: on one thread, with the same results."""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest

from tests.csrc.core import build
from valm_kernels.native import native


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_instruction_set_agrees_with_plain_loops(tmp_path):
    x86 = platform.machine() in ("x86_64", "AMD64")
    program = build("g++", tmp_path, "-Wno-unknown-pragmas", "-Wno-unused-parameter", x86=x86)
    symbols = subprocess.run(["nm", program], capture_output=True, text=True, check=True).stdout
    assert "GOMP" not in symbols
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ok"
    for isa in native().cpu_isas():
        assert done.stdout.count(f"on {isa}\n") == 10
