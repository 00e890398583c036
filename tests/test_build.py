"""setup.py builds with and without nvcc or OpenMP, and says so."""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bare_python import bare_python, path_without

ROOT = Path(__file__).parent.parent


def setup_py(command: list, python: str | Path = sys.executable, **environment: str) -> subprocess.CompletedProcess:
    """Runs setup.py of this tree under the given environment."""
    environment = {**os.environ, **environment}
    return subprocess.run([python, "setup.py", *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def build(tmp_path: Path, *python: Path, **environment: str) -> subprocess.CompletedProcess:
    """Builds the extension into tmp_path."""
    places = ["--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    return setup_py(["build_ext", *places], *python, **environment)


def in_module(tmp_path: Path, expression: str) -> str:
    """What `expression` of the module m built into tmp_path prints, in a process of its own."""
    (module,) = (tmp_path / "lib" / "valm_kernels").glob("_native*.so")
    script = (
        "import importlib.util as u, torch; "
        f"s = u.spec_from_file_location('valm_kernels._native', {str(module)!r}); "
        f"m = u.module_from_spec(s); s.loader.exec_module(m); print({expression})"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow  # a whole build; `make test` has just made one
def test_cpu_only_build_has_no_cuda_code(tmp_path):
    done = build(tmp_path, VALM_KERNELS_CUDA="off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "building CPU code only" in done.stdout
    assert in_module(tmp_path, "(m.built_with_cuda, m.cuda_obstacle)") == "(False, 'VALM_KERNELS_CUDA=off')"

    commands = json.loads((ROOT / "compile_commands.json").read_text())
    files = {Path(entry["file"]) for entry in commands}
    assert files == set((ROOT / "csrc").rglob("*.cpp"))
    (avx2,) = [entry["command"] for entry in commands if entry["file"].endswith("topk/cpu/kernels_avx2.cpp")]
    assert ("-mavx2" in avx2) == (platform.machine() == "x86_64")


@pytest.mark.slow
def test_a_compiler_without_openmp_builds_for_one_thread(tmp_path):
    compiler = tmp_path / "plain-c++"
    compiler.write_text(
        f"""#!/bin/sh
for argument; do
    if [ "$argument" = -fopenmp ]; then echo "unsupported option '-fopenmp'" >&2; exit 1; fi
done
exec {shutil.which("c++")} "$@"
"""
    )
    compiler.chmod(0o755)
    done = build(tmp_path, VALM_KERNELS_CUDA="off", CXX=str(compiler))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{compiler} has no OpenMP (-fopenmp), so the CPU code runs on one thread" in done.stdout
    assert in_module(tmp_path, "m.cpu_isas()[-1]") == "generic"


@pytest.mark.slow
def test_builds_without_pybind11_and_ninja(tmp_path):
    python = bare_python(tmp_path / "bare")
    path = path_without(tmp_path / "bin", "ninja")
    done = build(tmp_path, python, VALM_KERNELS_CUDA="off", PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "using its headers from PyTorch" in done.stdout and "ninja is missing" in done.stdout
    assert in_module(tmp_path, "m.cpu_isas()[-1]") == "generic"
    done = build(tmp_path, python, VALM_KERNELS_CUDA="off", PATH=path, VALM_KERNELS_CXXFLAGS="--no-such-flag")
    assert done.returncode != 0 and "valm_kernels: the C++ compiler fails: c++: error: " in done.stderr


def test_nvcc_compiles_for_the_chips_that_it_knows(tmp_path, monkeypatch):
    setup = load_setup(monkeypatch)
    monkeypatch.delenv("VALM_KERNELS_CUDA_ARCH", raising=False)
    lists = {  # what nvcc 11.5, 12.0 and 12.8 know, what is compiled of it, and as PTX
        "52 70 75 80 86 87": ("80", "80"),
        "75 80 86 89 90": ("80 90", "90"),
        "75 80 90 100 103 120": ("80 90 100 120", "90"),
    }
    for known, (built, ptx) in lists.items():
        nvcc = fake_nvcc(tmp_path, known)
        archs = [f"arch=compute_{arch},code=sm_{arch}" for arch in built.split()]
        assert setup.cuda_archs(str(nvcc)) == ([*archs, f"arch=compute_{ptx},code=compute_{ptx}"], "80")
    with pytest.raises(setup.NoCuda, match="compiles for none of the compute capabilities 80, 90, 100, 120"):
        setup.cuda_archs(str(fake_nvcc(tmp_path, "35 52 70 75")))
    with pytest.raises(setup.NoCuda, match=r"false --list-gpu-arch fails"):
        setup.cuda_archs(shutil.which("false"))


def fake_nvcc(home: Path, known: str) -> Path:
    """An nvcc of CUDA's folder `home` that knows these architectures and compiles nothing."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    archs = " ".join(f"compute_{arch}" for arch in known.split())
    nvcc.write_text(
        f"""#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then echo {archs}; exit; fi
echo "host_config.h:139:2: error: #error -- unsupported GNU version!" >&2
exit 1
"""
    )
    nvcc.chmod(0o755)
    return nvcc


def test_nvcc_is_looked_for_as_pytorch_does(tmp_path, monkeypatch):
    setup = load_setup(monkeypatch)
    homes = {name: tmp_path / name for name in ("home", "path", "usual")}
    for home in homes.values():
        home.mkdir()
        fake_nvcc(home, "80")
    monkeypatch.setenv("CUDA_HOME", str(homes["home"]))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(homes["path"] / "bin"))
    monkeypatch.setattr(setup, "CUDA_FOLDER", str(homes["usual"]))
    for home in homes.values():
        assert setup.find_nvcc() == str(home / "bin" / "nvcc")
        (home / "bin" / "nvcc").unlink()
    with pytest.raises(setup.NoCuda, match=f"neither under CUDA_HOME .* nor under {homes['usual']}"):
        setup.find_nvcc()


@pytest.mark.parametrize(
    ("named", "option"),
    [("", ""), ("g++-11", "-ccbin g++-11"), ("ccache /opt/g++ -m64", "-ccbin /opt/g++")],
)
def test_nvcc_compiles_host_code_with_the_compiler_that_is_named(monkeypatch, named, option):
    setup = load_setup(monkeypatch)
    monkeypatch.setenv("CXX", named)
    assert setup.host_compiler() == option


@pytest.mark.slow
def test_a_failing_nvcc_leaves_a_build_for_the_cpu(tmp_path):
    """Under VALM_KERNELS_CUDA=auto, and the module says why; under "on" the build ends in a sentence."""
    nvcc = fake_nvcc(tmp_path, "80 90")
    why = f"{nvcc} fails: host_config.h:139:2: error: #error -- unsupported GNU version!"
    done = build(tmp_path, VALM_KERNELS_CUDA="on", CUDA_HOME=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"VALM_KERNELS_CUDA=on, but {why}. Install CUDA's toolkit")
    done = build(tmp_path, VALM_KERNELS_CUDA="auto", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"valm_kernels: no CUDA code, because {why}" in done.stdout
    assert in_module(tmp_path, "(m.built_with_cuda, m.cuda_obstacle)") == str((False, why))


def test_one_compute_capability(monkeypatch):
    """As gpu-check builds for the card that is there."""
    setup = load_setup(monkeypatch)
    monkeypatch.setenv("VALM_KERNELS_CUDA_ARCH", "90")
    rules = setup.compiler_rules("nvcc", [], [])
    assert rules["cuda"].count("-gencode") == 1
    assert "-gencode 'arch=compute_90,code=[sm_90,compute_90]' -DVALM_KERNELS_CUDA=90 " in rules["cuda"]
    assert " -DVALM_KERNELS_CUDA=90 " in rules["host"]
    monkeypatch.setenv("VALM_KERNELS_CUDA_ARCH", "9.0")
    with pytest.raises(SystemExit, match=r"must be a compute capability such as 90, but is '9\.0'"):
        setup.compiler_rules("nvcc", [], [])


def load_setup(monkeypatch):
    """setup.py as a module, without setting anything up."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("valm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "valm_setup", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "command", "alone"),
    [("70.2.0", "build_ext", True), ("77.0.3", "build_ext", False), ("70.2.0", "sdist", False)],
)
def test_an_old_setuptools_reads_no_pyproject_for_the_native_module(monkeypatch, version, command, alone):
    setup = load_setup(monkeypatch)
    monkeypatch.setattr("setuptools.__version__", version)
    monkeypatch.setattr(sys, "argv", ["setup.py", command, "--inplace"])
    assert (setup.distribution() is setup.NativeAlone) == alone
    if alone:
        distribution = setup.distribution()({"ext_modules": []})
        distribution.parse_config_files()
        assert distribution.metadata.license is None


def test_cuda_on_without_nvcc_is_an_error(tmp_path, monkeypatch):
    setup = load_setup(monkeypatch)
    monkeypatch.setattr(setup, "CUDA_FOLDER", str(tmp_path))
    monkeypatch.setenv("CXX", str(shutil.which("c++")))
    for name, value in {"VALM_KERNELS_CUDA": "on", "PATH": "", "CUDA_HOME": str(tmp_path), "CUDA_PATH": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=r"=on, but nvcc is neither under CUDA_HOME .* Install CUDA's toolkit"):
        setup.NativeBuild(setup.Distribution()).build_extension(None)


@pytest.mark.slow
def test_a_build_without_a_compiler_ends_in_one_sentence(tmp_path):
    """And soon: no file is copied first."""
    environment = {"PATH": str(tmp_path), "CXX": "", "VALM_KERNELS_CUDA": "off"}
    done = setup_py(["build", "--build-base", tmp_path / "build"], **environment)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("The native code of valm needs a compiler for C++17, but there is no 'c++' here: install")
    assert "Traceback" not in done.stderr and len(done.stdout.splitlines()) < 10, done.stdout
    assert not (tmp_path / "build").exists()


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["yes", ""])
def test_unknown_cuda_choice_is_an_error(tmp_path, choice):
    done = build(tmp_path, VALM_KERNELS_CUDA=choice)
    assert done.returncode != 0
    assert "must be auto, on or off" in done.stderr
