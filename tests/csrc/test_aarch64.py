"""The native CPU code on aarch64, cross-compiled and run by qemu's user mode."""

from __future__ import annotations

import shutil

import pytest

from tests.csrc.core import build, lines_of

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


@pytest.mark.slow  # the same kernels run on this machine in tests/valm_kernels
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER} (Debian: g++-aarch64-linux-gnu)")
@pytest.mark.skipif(EMULATOR is None, reason="needs qemu-aarch64 (Debian: qemu-user)")
def test_the_generic_kernels_agree_with_plain_loops(tmp_path):
    program = build(COMPILER, tmp_path, "-fopenmp", "-static", x86=False)
    lines = lines_of(EMULATOR, program)
    assert sum(line.endswith("on generic") for line in lines) == 11
