"""Builds valm_kernels._native with one build.ninja for host and CUDA code.

The module includes no PyTorch headers, so one build serves every torch version, and pip's build isolation needs only
pybind11 and ninja. VALM_KERNELS_CUDA=auto|on|off chooses the CUDA part. "auto" (the default) builds it if nvcc is found
and works. Otherwise it builds the module only for the CPU, and `python -m valm_kernels` prints why. "on" raises an
error instead. The build never looks at the GPU. VALM_KERNELS_CUDA_ARCH=90 builds only for compute capability 9.0, and
PTX for newer GPUs, which takes less time. VALM_KERNELS_CXXFLAGS adds flags for the host code, after ours (`make
sanitize`).

`python setup.py build_ext --inplace` also works without pybind11, whose headers PyTorch ships, without ninja (then
every source is compiled each time, in as many processes as there are cores) and with a setuptools before 77.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from string import Template

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command import build as build_command
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

HOST_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# A Python module leaves Python's own functions undefined; only macOS's linker needs a flag for that.
LINK_FLAGS = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
# One binary for every x86-64: a file whose stem ends in one of these is compiled for that instruction set
# and called only after a run-time check. Never -march=native.
ISA_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "_amxint8": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"],
    "_avx512vnni": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"],
}
# Machine code for A100, H100, B200 and RTX 50; nvcc knows B200 and RTX 50 from 12.8 on.
CUDA_ARCHS = ("80", "90", "100", "120")
# Other GPUs compile PTX at load time. The newest PTX here is for 9.0, so that a driver of CUDA 12 can compile it.
NEWEST_PTX = 90
# Where CUDA's installers put the toolkit, and torch.utils.cpp_extension looks for it.
CUDA_FOLDER = "/usr/local/cuda"
# All architectures at the same time.
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "--threads", "0"]
# Programs that run a compiler, in front of its name in CXX.
LAUNCHERS = ("ccache", "sccache", "distcc")


class NoCuda(Exception):
    """The CUDA part cannot be built. The message says why, without a full stop."""


def cuda_choice() -> str:
    choice = os.environ.get("VALM_KERNELS_CUDA", "auto")
    if choice not in ("auto", "on", "off"):
        raise SystemExit(f"VALM_KERNELS_CUDA must be auto, on or off, but is {choice!r}")
    return choice


def find_nvcc() -> str:
    """The nvcc to build with, in the order in which PyTorch looks for it.

    Raises:
        NoCuda: there is no nvcc.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [*(Path(home) / "bin" / "nvcc" for home in homes), shutil.which("nvcc"), f"{CUDA_FOLDER}/bin/nvcc"]
    nvcc = next((str(candidate) for candidate in candidates if candidate and Path(candidate).exists()), None)
    if nvcc is None:
        raise NoCuda(f"nvcc is neither under CUDA_HOME or CUDA_PATH, nor on PATH, nor under {CUDA_FOLDER}")
    return nvcc


def cuda_archs(nvcc: str) -> tuple[list[str], str]:
    """nvcc's options for VALM_KERNELS_CUDA_ARCH or the CUDA_ARCHS that it knows, and the oldest of these.

    Raises:
        NoCuda: nvcc knows none of the CUDA_ARCHS.
    """
    arch = os.environ.get("VALM_KERNELS_CUDA_ARCH", "")
    if arch:
        if not re.fullmatch(r"\d{2,3}", arch):
            raise SystemExit(f"VALM_KERNELS_CUDA_ARCH must be a compute capability such as 90, but is {arch!r}")
        return [f"arch=compute_{arch},code=[sm_{arch},compute_{arch}]"], arch
    try:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoCuda(f"{nvcc} --list-gpu-arch fails ({error}); CUDA 11.2 and newer support it") from error
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]
    if not archs:
        raise NoCuda(f"{nvcc} compiles for none of the compute capabilities {', '.join(CUDA_ARCHS)}")
    ptx = ([arch for arch in archs if int(arch) <= NEWEST_PTX] or archs[:1])[-1]
    machine_code = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*machine_code, f"arch=compute_{ptx},code=compute_{ptx}"], archs[0]


def host_compiler() -> str:
    """The option of nvcc that names the compiler in CXX; "" if CXX is not set."""
    named = [word for word in shlex.split(os.environ.get("CXX") or "") if Path(word).name not in LAUNCHERS]
    return f"-ccbin {shlex.quote(named[0])}" if named else ""


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
    return ["-Wno-unknown-pragmas", "-Wno-unused-parameter"]  # only pragmas use the number of threads


def host_flags(source: Path) -> list[str]:
    if platform.machine() in ("x86_64", "AMD64"):
        for suffix, flags in ISA_FLAGS.items():
            if source.stem.endswith(suffix):
                return HOST_FLAGS + flags
    return HOST_FLAGS


class NativeFirst(build_command.build):
    """Builds the native module first, so that its errors do not stand below hundreds of copied files."""

    sub_commands = sorted(build_command.build.sub_commands, key=lambda command: command[0] != "build_ext")


class NativeAlone(Distribution):
    """The native module, which pyproject.toml does not mention."""

    def parse_config_files(self, *arguments: object, **keywords: object) -> None:
        pass


def distribution() -> type[Distribution]:
    """The class of the distribution. An old setuptools cannot read the licence in pyproject.toml, and need not do so
    if nothing is packed."""
    old = int(setuptools.__version__.partition(".")[0]) < 77
    return NativeAlone if old and sys.argv[1:2] == ["build_ext"] else Distribution


@dataclass(frozen=True)
class Build:
    """One command of the compiler or linker: a rule of `rules` for these files."""

    output: str
    rule: str
    inputs: tuple[Path | str, ...]
    flags: str = ""

    def command(self, rules: dict[str, str]) -> str:
        """The command line for the shell."""
        inputs = " ".join(shlex.quote(str(path)) for path in self.inputs)
        values = {"in": inputs, "out": shlex.quote(self.output), "flags": self.flags}
        return Template(rules[self.rule]).safe_substitute(values)


class NativeBuild(build_ext):
    """build_ext whose compiler calls go through ninja, or without ninja through a few processes. A build in place, for
    tests, also contains AMX's code with arrays as its registers (VALM_KERNELS_EMULATE_AMX)."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.defines = ["-DVALM_KERNELS_EMULATE_AMX"] if self.inplace else []  # run() clears inplace

    def build_extension(self, ext: Extension) -> None:
        choice = cuda_choice()
        check_compiler()
        if choice == "off":
            self.build_native(ext, None, "VALM_KERNELS_CUDA=off")
            return
        try:
            self.build_native(ext, find_nvcc(), "")
        except NoCuda as error:
            if choice == "on":
                raise SystemExit(
                    f"VALM_KERNELS_CUDA=on, but {error}. Install CUDA's toolkit, name its folder in CUDA_HOME or a C++ "
                    "compiler that it takes in CXX, or build for the CPU with VALM_KERNELS_CUDA=off."
                ) from None
            print(f"valm_kernels: no CUDA code, because {error}")
            self.build_native(ext, None, str(error))

    def build_native(self, ext: Extension, nvcc: str | None, obstacle: str) -> None:
        """Builds the module, with a CUDA part if there is an nvcc, otherwise with the reason why not.

        Raises:
            NoCuda: the CUDA part cannot be built.
        """
        print(f"valm_kernels: building {'CPU and CUDA code, ' + nvcc if nvcc else 'CPU code only'}")
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        in_c = json.dumps(obstacle.encode("ascii", "backslashreplace").decode())
        write_if_changed(build_dir / "cuda_obstacle.hpp", f"#define VALM_KERNELS_CUDA_OBSTACLE {in_c}\n")
        openmp = openmp_flags()
        includes = [ROOT / "csrc", build_dir, pybind11_include(), sysconfig.get_path("include")]
        rules = compiler_rules(nvcc, openmp, includes)
        builds = native_builds(nvcc, openmp + self.defines, output)
        write_compile_commands(rules, builds)
        if ninja := find_ninja():
            (build_dir / "build.ninja").write_text(ninja_file(rules, builds))
        else:
            print("valm_kernels: ninja is missing, so every source is compiled, changed or not")
        for rule in ("cuda", "host", "link"):  # nvcc first, so that nothing is compiled in vain if it fails
            some = [build for build in builds if build.rule == rule]
            if ninja and some:
                failed = output_of_failed([ninja, "-C", str(build_dir), *(build.output for build in some)])
            else:
                failed = run_all([build.command(rules) for build in some], build_dir)
            if failed and nvcc and rule != "host":
                raise NoCuda(f"{nvcc} fails: {first_error(failed)}")
            if failed:
                raise SystemExit(f"valm_kernels: the C++ compiler fails: {first_error(failed)}")


def pybind11_include() -> str:
    """The headers of the installed pybind11, or of PyTorch, which ships them."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return pybind11.get_include()
    torch = importlib.util.find_spec("torch")
    folders = [Path(folder) / "include" for folder in torch.submodule_search_locations or ()] if torch else []
    for folder in folders:
        if (folder / "pybind11" / "pybind11.h").exists():
            print(f"valm_kernels: pybind11 is not installed, using its headers from PyTorch in {folder}")
            return str(folder)
    raise SystemExit("valm_kernels is built with pybind11, which is not installed: pip install pybind11")


def find_ninja() -> str | None:
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    return shutil.which("ninja")


def write_if_changed(file: Path, text: str) -> None:
    """Writes a file unless it has this text, so that ninja does not compile again what includes it."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def compiler_rules(nvcc: str | None, openmp: list[str], includes: list) -> dict[str, str]:
    """Commands by name, with $in, $out and $flags."""
    include_flags = " ".join(f'-I"{path}"' for path in includes)
    archs, oldest = cuda_archs(nvcc) if nvcc else ([], "")
    defines = f"-DVALM_KERNELS_CUDA={oldest}" if nvcc else ""
    more_flags = os.environ.get("VALM_KERNELS_CXXFLAGS", "")
    host = f"{cxx()} -MMD -MF $out.d $flags {more_flags} {defines} {include_flags} -c $in -o $out"
    if nvcc is None:
        return {"host": host, "link": f"{cxx()} {' '.join([*LINK_FLAGS, *openmp, more_flags])} $in -o $out"}
    gencode = " ".join(f"-gencode '{arch}'" for arch in archs)
    nvcc = f"{shlex.quote(nvcc)} {host_compiler()}"
    cuda = f"{nvcc} -MD -MF $out.d {' '.join(NVCC_FLAGS)} {gencode} {defines} {include_flags} -c $in -o $out"
    link = f"{nvcc} -shared -cudart static -Xcompiler {','.join(openmp)} $in -o $out"
    return {"host": host, "cuda": cuda, "link": link}


def native_builds(nvcc: str | None, flags: list[str], output: Path) -> list[Build]:
    """The builds of the objects, and last of the module."""
    objects = []
    for source in sorted((ROOT / "csrc").rglob("*.c*")):
        if source.suffix not in (".cpp", ".cu") or (source.suffix == ".cu" and not nvcc):
            continue
        name = str(source.relative_to(ROOT / "csrc").with_suffix(source.suffix + ".o")).replace(os.sep, ".")
        if source.suffix == ".cu":
            objects.append(Build(name, "cuda", (source,)))
        else:
            objects.append(Build(name, "host", (source,), " ".join(host_flags(source) + flags)))
    return [*objects, Build(str(output), "link", tuple(build.output for build in objects))]


def ninja_file(rules: dict[str, str], builds: list[Build]) -> str:
    lines = ["ninja_required_version = 1.5"]
    for name, command in rules.items():
        lines.append(f"rule {name}\n  command = {command}")
        if name != "link":
            lines.append("  depfile = $out.d\n  deps = gcc")
    for build in builds:
        inputs = " ".join(ninja_path(path) for path in build.inputs)
        lines.append(f"build {ninja_path(build.output)}: {build.rule} {inputs}\n  flags = {build.flags}")
    lines.append(f"default {ninja_path(builds[-1].output)}")
    return "\n".join(lines) + "\n"


def output_of_failed(command: list[str] | str, folder: Path | None = None) -> str:
    """Runs a command and prints its output. Returns the output if the command fails, otherwise ""."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    done = subprocess.run(command, shell=isinstance(command, str), cwd=folder, **options)
    print(done.stdout, end="", flush=True)
    return f"{command} fails\n{done.stdout}" if done.returncode else ""


def first_error(output: str) -> str:
    """The line of a compiler's output that says why it failed."""
    lines = [line.strip() for line in output.splitlines() if not line.startswith("ninja:")]
    return next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[-1])[:300]


def run_all(commands: list[str], folder: Path) -> str:
    """Runs commands in as many processes as there are cores. Returns the output of the failed commands."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return "".join(threads.map(lambda command: output_of_failed(command, folder), commands))


def write_compile_commands(rules: dict[str, str], builds: list[Build]) -> None:
    """Writes compile_commands.json in the root of the sources, for editors and clang-tidy."""
    # every path except the output's is absolute, and pip removes the build's own folder
    commands = [
        {"directory": str(ROOT), "command": build.command(rules), "file": str(build.inputs[0]), "output": build.output}
        for build in builds[:-1]
    ]
    (ROOT / "compile_commands.json").write_text(json.dumps(commands, indent=2) + "\n")


def ninja_path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    distclass=distribution(),
    ext_modules=[Extension("valm_kernels._native", sources=["csrc/bindings.cpp"])],
    cmdclass={"build": NativeFirst, "build_ext": NativeBuild},
)
