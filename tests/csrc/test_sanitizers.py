"""The native CPU code as a program under sanitizers: nothing outside of its memory, undefined, leaked or raced for.

`make sanitize` runs this, and the tests in Python with a native module that was built so.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.csrc.core import X86, build, lines_of

CLANG = shutil.which("clang++") or shutil.which("clang++-14")

# Two cores compile for minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def archer() -> str | None:
    """The library that tells ThreadSanitizer of the barriers in Clang's OpenMP."""
    if CLANG is None:
        return None
    found = subprocess.run([CLANG, "-print-file-name=libarcher.so"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_memory_and_arithmetic(tmp_path):
    flags = ["-fopenmp", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    lines_of(build("g++", tmp_path, *flags, x86=X86))


@pytest.mark.skipif(archer() is None, reason="needs Clang with its OpenMP (Debian: clang-14, libomp-14-dev)")
def test_races(tmp_path):
    """Not with GCC: its OpenMP waits where ThreadSanitizer does not see it, so every barrier would be a race."""
    program = build(CLANG, tmp_path, "-fopenmp", "-g", "-fsanitize=thread", "-Wno-error", x86=X86)
    lines_of(program, OMP_TOOL_LIBRARIES=archer(), TSAN_OPTIONS="ignore_noninstrumented_modules=1")
