"""The native CPU code as a compiler without OpenMP builds it: on one thread, with the same results."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.csrc.core import X86, build, lines_of
from valm_kernels.native import native


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_instruction_set_agrees_with_plain_loops(tmp_path):
    program = build("g++", tmp_path, "-Wno-unknown-pragmas", "-Wno-unused-parameter", x86=X86)
    symbols = subprocess.run(["nm", program], capture_output=True, text=True, check=True).stdout
    assert "GOMP" not in symbols
    lines = lines_of(program)
    for isa in native().cpu_isas():
        assert sum(line.endswith(f"on {isa}") for line in lines) == 11
