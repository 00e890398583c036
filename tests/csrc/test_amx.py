"""The machine code of AMX's kernels, on the processor where it has AMX and emulated where it has not."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csrc.core import CSRC, build
from valm_kernels.native import native

SOURCES = [
    Path(__file__).with_name("amx") / "driver.cpp",
    CSRC / "simd" / "isa.cpp",
    *(
        CSRC / "topk" / "cpu" / f"{name}.cpp"
        for name in ("search", "query", "pack", "kernels_tiles", "kernels_amxint8")
    ),
]


@pytest.mark.slow  # it compiles
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="needs g++ on Linux for x86-64",
)
@pytest.mark.skipif("avx512vnni" not in native().cpu_isas(), reason="the rest of the kernels is AVX-512 VNNI")
def test_the_instructions_of_amx_give_what_arrays_give(tmp_path):
    program = build("g++", tmp_path, "-fopenmp", x86=True, sources=SOURCES)
    done = subprocess.run([program], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    how, last = done.stdout.splitlines()
    assert last == "ok"
    assert how == "on the processor" or int(how.removesuffix(" instructions emulated")) > 10_000
