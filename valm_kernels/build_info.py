"""What this build of valm_kernels can do on this machine, and why something is not usable."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .native import cpu_isa, native
from .topk.cuda import has_code
from .version import __version__

# The compute capability that Triton's kernels need.
LEAST_CAPABILITY = (8, 0)
# On compute capability 9.0, older versions of ptxas can reuse the registers of a product in flight
# (https://github.com/triton-lang/triton/pull/11781).
LEAST_PTXAS = (13, 3)


def show_config() -> str:
    """Prints what was built, what is usable and why something is not, for a bug report.

    Lists versions, the native module and its instruction set, CUDA devices, Triton, and every OpenMP runtime in the
    process. If there are several OpenMP runtimes, they compete for the cores.

    Returns:
        The printed text, one line for each item.

    Example:
        >>> report = valm_kernels.show_config()
        valm ...
        Python ...
        OpenMP runtimes ...
    """
    lines = [
        ("valm", __version__),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("numpy", _version("numpy")),
        ("native module", _native_module()),
        ("instruction set", _instruction_set()),
        ("CUDA in the native module", _native_cuda()),
        ("CUDA in torch", _torch_cuda()),
        ("Triton", _triton()),
        ("OpenMP runtimes", ", ".join(_openmp_runtimes()) or "none found"),
    ]
    return _table(lines)


def show_paths() -> str:
    """Prints and returns five lines: what was built, and which code each operation runs here."""
    lines = [
        ("native module", _native_module()),
        ("CUDA in the native module", _native_cuda()),
        ("search on a CPU, on a GPU", f"{_cpu_path()}; {_gpu_search()}"),
        ("attention on a CPU", _cpu_path()),
        ("attention on a GPU", _attention_on_gpu()),
    ]
    return _table(lines)


def _table(lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
    print(text)
    return text


def triton_obstacle() -> str:
    """Why Triton cannot launch a kernel here; "" if it can. Its first launch compiles a launcher in C and links it to
    the driver's library."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY and torch.version.hip is None:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    if not os.environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
        return "Triton needs a C compiler: apt-get install gcc, or name one in the environment variable CC"
    # as triton.runtime.build chooses the folder
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    if not header.exists():
        return f"Triton needs Python's header {header}: apt-get install python3-dev"
    return "" if torch.version.hip is not None else _driver_obstacle()


def ptxas(capability: int) -> tuple[str, tuple[int, ...]]:
    """The path and version of the ptxas that Triton uses for a compute capability, 90 for 9.0."""
    from triton.backends.nvidia import compiler

    try:
        tool = compiler.get_ptxas(capability)
    except TypeError:  # Triton 3.5 has one for all
        tool = compiler.get_ptxas()
    return tool.path, tuple(map(int, tool.version.split(".")))


def ptxas_risk(capability: int) -> str:
    """What the ptxas for this compute capability is known to do wrong, and the remedy; "" if nothing."""
    path, found = ptxas(capability)
    if capability // 10 != 9 or found >= LEAST_PTXAS:
        return ""
    return (
        f"{path} is ptxas {'.'.join(map(str, found))}. Before 13.3, ptxas miscompiles some kernels for compute "
        "capability 9.0 (none of these kernels, as far as their machine code shows): install Triton 3.9, or name a "
        "newer ptxas in TRITON_PTXAS_PATH"
    )


def _attention_on_gpu() -> str:
    if obstacle := triton_obstacle():
        return f"not usable: {obstacle}"
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.version.hip is not None:
        return "Triton's kernels"
    major, minor = torch.cuda.get_device_capability()
    risk = ptxas_risk(10 * major + minor)
    return f"Triton's kernels; {risk}" if risk else "Triton's kernels"


def _driver_obstacle() -> str:
    """Why Triton's launcher cannot be linked to the driver's library; "" if it can."""
    from triton.backends.nvidia import driver

    try:
        folders = driver.library_dirs()
    except (AssertionError, OSError, subprocess.CalledProcessError):  # of ldconfig, or of what it finds
        return "Triton does not find libcuda.so.1: name its folder in the environment variable TRITON_LIBCUDA_PATH"
    # Triton 3.5 links -lcuda, for which the linker wants the name without a version
    for name in (library if ".so" in library else f"lib{library}.so" for library in driver.libraries):
        if not any((Path(folder) / name).exists() for folder in folders):
            file = f"{folders[-1]}/{name}"
            return f"Triton {_version('triton')} needs {file} to link to: ln -s libcuda.so.1 {file}, or a newer Triton"
    return ""


def _cpu_path() -> str:
    try:
        return f"native code, {cpu_isa()}"
    except (ImportError, ValueError):
        return "only impl='reference'"


def _gpu_search() -> str:
    has_cuda = has_code(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return "native CUDA code" if has_cuda else "PyTorch's matrix products, with the same results"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed by pip"


def _native_module() -> str:
    try:
        return str(native().__file__)
    except ImportError as error:
        return f"not usable: {error}"


def _instruction_set() -> str:
    try:
        isa, image_isa = cpu_isa(), native().image_attn_isa(cpu_isa())
        obstacle = native().amx_obstacle()
        return f"{isa} in top-K, {image_isa} in image attention, of {', '.join(native().cpu_isas())}" + (
            f"; {obstacle}" if obstacle else ""
        )
    except ImportError:
        return "not usable: no native module"
    except ValueError as error:
        return f"not usable: {error}"


def _native_cuda() -> str:
    try:
        module = native()
    except ImportError:
        return "not usable: no native module"
    if not module.built_with_cuda:
        return f"not built: {module.cuda_obstacle}"
    try:
        return "; ".join(module.cuda_devices())
    except RuntimeError as error:
        return f"built, not usable here: {error}"


def _torch_cuda() -> str:
    if torch.version.cuda is None:
        return "not built: a CPU build of torch"
    if not torch.cuda.is_available():
        return f"CUDA {torch.version.cuda}, no usable device"
    return f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed: impl='triton' is not usable"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return f"{_version('triton')}, interpreting (TRITON_INTERPRET=1)"
    return f"{_version('triton')}" + (
        "" if torch.cuda.is_available() else ", needs a CUDA device or TRITON_INTERPRET=1"
    )


def _openmp_runtimes() -> list[str]:
    """Shared libraries of this process that are OpenMP runtimes (Linux only)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    mappings = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
    paths = {fields[5] for fields in mappings if len(fields) == 6}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))
