"""Builds valm_kernels._native with one build.ninja for host and CUDA code.

The module has no PyTorch headers, so one build serves every torch version and pip's build isolation needs
only pybind11 and ninja. VALM_KERNELS_CUDA=auto|on|off chooses the CUDA part: "auto" (the default) builds it
when nvcc is found, "on" without nvcc is an error. The GPU itself is never looked at. VALM_KERNELS_CXXFLAGS has more
flags for the host code, behind ours (`make sanitize`).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

HOST_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# A Python module leaves Python's own functions open; only macOS wants that said.
LINK_FLAGS = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
# One binary for every x86-64: a file whose stem ends in one of these is compiled for that instruction set
# and called only after a run-time check. Never -march=native.
ISA_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "_avx512vnni": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"],
}
# Machine code for A100 and H100, and PTX that newer chips compile at load time.
CUDA_ARCHS = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]


def find_nvcc() -> str | None:
    """The nvcc to build with, or None for a CPU-only build, as VALM_KERNELS_CUDA asks."""
    choice = os.environ.get("VALM_KERNELS_CUDA", "auto")
    if choice not in ("auto", "on", "off"):
        raise SystemExit(f"VALM_KERNELS_CUDA must be auto, on or off, but is {choice!r}")
    if choice == "off":
        return None
    candidates = [shutil.which("nvcc")]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates += [str(Path(home) / "bin" / "nvcc") for home in homes]
    nvcc = next((c for c in candidates if c and Path(c).exists()), None)
    if nvcc is None and choice == "on":
        raise SystemExit(
            "VALM_KERNELS_CUDA=on, but nvcc is neither on PATH nor under CUDA_HOME. Install the CUDA "
            "toolkit, or build with VALM_KERNELS_CUDA=auto for the CPU only."
        )
    return nvcc


def cxx() -> str:
    return os.environ.get("CXX") or "c++"


def check_compiler() -> None:
    if shutil.which(shlex.split(cxx())[0]) is None:
        raise SystemExit(
            f"The native code of valm needs a compiler for C++17, but there is no {cxx()!r} here: install one (Debian, "
            "Ubuntu: apt-get install g++), name yours in the environment variable CXX, or install a wheel that `make "
            "wheel` built elsewhere."
        )


def openmp_flags() -> list[str]:
    """The flags for OpenMP; none where the C++ compiler lacks it (Apple's clang), for a build on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "openmp.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*shlex.split(cxx()), "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return ["-fopenmp"]
    print(f"valm_kernels: {cxx()} has no OpenMP (-fopenmp), so the CPU code runs on one thread")
    return ["-Wno-unknown-pragmas", "-Wno-unused-parameter"]  # the number of threads is used by pragmas alone


def host_flags(source: Path) -> list[str]:
    if platform.machine() in ("x86_64", "AMD64"):
        for suffix, flags in ISA_FLAGS.items():
            if source.stem.endswith(suffix):
                return HOST_FLAGS + flags
    return HOST_FLAGS


class Build(build):
    """The native module comes first, so that what stops it does not stand below hundreds of copied files."""

    sub_commands = sorted(build.sub_commands, key=lambda command: command[0] != "build_ext")


class NinjaBuild(build_ext):
    """build_ext whose compiler calls all go through ninja."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        check_compiler()

        import ninja
        import pybind11

        print(f"valm_kernels: building {'CPU and CUDA code, ' + nvcc if nvcc else 'CPU code only'}")
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
        (build_dir / "build.ninja").write_text(self.ninja_file(nvcc, openmp_flags(), includes, output))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir)]
        write_compile_commands(command)
        subprocess.run(command, check=True)

    def ninja_file(self, nvcc: str | None, openmp: list[str], includes: list, output: Path) -> str:
        include_flags = " ".join(f'-I"{path}"' for path in includes)
        defines = "-DVALM_KERNELS_CUDA" if nvcc else ""
        more_flags = os.environ.get("VALM_KERNELS_CXXFLAGS", "")
        lines = [
            "ninja_required_version = 1.5",
            f"rule host\n  command = {cxx()} -MMD -MF $out.d $flags {more_flags} {defines} {include_flags} -c $in "
            "-o $out",
            "  depfile = $out.d\n  deps = gcc",
        ]
        if nvcc:
            gencode = " ".join(f"-gencode {arch}" for arch in CUDA_ARCHS)
            lines += [
                f"rule cuda\n  command = {nvcc} -MD -MF $out.d {' '.join(NVCC_FLAGS)} {gencode} {defines} "
                f"{include_flags} -c $in -o $out",
                "  depfile = $out.d\n  deps = gcc",
                f"rule link\n  command = {nvcc} -shared -cudart static -Xcompiler {','.join(openmp)} $in -o $out",
            ]
        else:
            lines += [f"rule link\n  command = {cxx()} {' '.join([*LINK_FLAGS, *openmp, more_flags])} $in -o $out"]

        objects = []
        for source in sorted((ROOT / "csrc").rglob("*.c*")):
            if source.suffix not in (".cpp", ".cu") or (source.suffix == ".cu" and not nvcc):
                continue
            name = str(source.relative_to(ROOT / "csrc").with_suffix(source.suffix + ".o"))
            objects.append(name.replace(os.sep, "."))
            rule = "cuda" if source.suffix == ".cu" else "host"
            lines.append(f"build {objects[-1]}: {rule} {ninja_path(source)}")
            if rule == "host":
                lines.append(f"  flags = {' '.join(host_flags(source) + openmp)}")
        lines.append(f"build {ninja_path(output)}: link {' '.join(objects)}")
        lines.append(f"default {ninja_path(output)}")
        return "\n".join(lines) + "\n"


def write_compile_commands(ninja: list[str]) -> None:
    """compile_commands.json in the root of the sources, for editors and clang-tidy."""
    listed = subprocess.run([*ninja, "-t", "compdb", "host", "cuda"], check=True, capture_output=True, text=True)
    # every path but that of the output is absolute, and pip removes the build's own folder
    commands = [{**entry, "directory": str(ROOT)} for entry in json.loads(listed.stdout)]
    (ROOT / "compile_commands.json").write_text(json.dumps(commands, indent=2) + "\n")


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[Extension("valm_kernels._native", sources=["csrc/bindings.cpp"])],
    cmdclass={"build": Build, "build_ext": NinjaBuild},
)
