"""The native CPU code as a program without Python: a driver, and the sources that setup.py compiles."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
X86 = platform.machine() in ("x86_64", "AMD64")
ISA_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "_amxint8": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"],
    "_avx512vnni": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"],
}


def build(compiler: str, folder: Path, *flags: str, x86: bool, sources: Sequence[Path] | None = None) -> Path:
    """Compiles `sources` (by default driver.cpp and all native code) into `folder` with `flags`. With `x86`, each file
    also gets its instruction set's flags."""
    if sources is None:
        sources = [path for path in CSRC.rglob("*.cpp") if path.name != "bindings.cpp"]
        sources.append(ROOT / "tests" / "csrc" / "driver.cpp")

    def compile_file(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        isa_flags = ISA_FLAGS.get(f"_{source.stem.rpartition('_')[2]}", []) if x86 else []
        _run(compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-DVALM_KERNELS_EMULATE_AMX",
             f"-I{CSRC}", *flags, *isa_flags, "-pthread", "-c", str(source), "-o", str(target))  # fmt: skip
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compile_file, sources)]
    program = folder / "driver"
    _run(compiler, "-pthread", *flags, *objects, "-o", str(program))
    return program


def lines_of(*command: str | Path, **environment: str) -> list[str]:
    """The output of a program that finds no difference."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-10000:]
    lines = done.stdout.splitlines()
    assert lines[-1] == "ok"
    return lines


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
