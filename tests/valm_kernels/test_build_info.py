import runpy
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from valm_kernels import build_info, show_config


def test_show_config_prints_what_it_returns(capsys):
    text = show_config()
    assert capsys.readouterr().out.strip() == text
    for name in ("torch", "native module", "CUDA in the native module", "Triton", "OpenMP runtimes"):
        assert any(line.startswith(name) for line in text.splitlines()), name
    assert torch.__version__ in text


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("generic", "generic in top-K, generic in image attention, of "),
        ("avx9", "not usable: VALM_KERNELS_ISA is 'avx9', this machine runs "),
    ],
)
def test_show_config_names_the_instruction_sets(monkeypatch, asked, shown):
    monkeypatch.setenv("VALM_KERNELS_ISA", asked)
    (line,) = [line for line in show_config().splitlines() if line.startswith("instruction set")]
    assert line.removeprefix("instruction set").strip().startswith(shown)
    assert "generic, tiles" in line


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        ({"built_with_cuda": False, "cuda_obstacle": "nvcc fails"}, "not built: nvcc fails"),
        ({"built_with_cuda": True, "cuda_devices": lambda: ["A card", "B card"]}, "A card; B card"),
    ],
)
def test_show_config_names_the_cards(monkeypatch, module, shown):
    monkeypatch.setattr(build_info, "native", lambda: SimpleNamespace(**module))
    assert build_info._native_cuda().startswith(shown)


@pytest.mark.parametrize("interpreting", [False, True])
def test_show_config_says_that_triton_interprets(monkeypatch, interpreting):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreting)))
    assert ("interpreting (TRITON_INTERPRET=1)" in show_config()) == interpreting


def test_show_config_names_the_openmp_runtime():
    (line,) = [line for line in show_config().splitlines() if line.startswith("OpenMP runtimes")]
    assert "libgomp" in line


@pytest.mark.slow  # it starts a process
def test_native_code_and_torch_share_one_openmp_runtime():
    # in a process of its own: faiss, which other tests import, brings another runtime along
    code = "from valm_kernels.native import native; native(); import valm_kernels; valm_kernels.show_config()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("OpenMP runtimes")]
    assert line.count("libgomp") == 1


def test_the_package_as_a_command_says_in_five_lines_what_runs(capsys):
    runpy.run_module("valm_kernels", run_name="__main__")
    printed = capsys.readouterr().out
    starts = (
        "native module ",
        "CUDA in the native module ",
        "search on ",
        "attention on a CPU ",
        "attention on a GPU ",
    )
    assert [line.startswith(start) for line, start in zip(printed.splitlines(), starts, strict=True)] == [True] * 5
    assert "native code, " in printed


def test_triton_says_what_its_first_launch_lacks(monkeypatch, tmp_path):
    """A launch needs a GPU, a C compiler, Python's header and the driver's library."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert build_info.triton_obstacle() == ""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert build_info.triton_obstacle() == "torch finds no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert build_info.triton_obstacle() == "the GPU has compute capability 7.5, the kernels need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_info.triton_obstacle().startswith("Triton needs a C compiler: apt-get install gcc")
    monkeypatch.setenv("CC", "my-cc")
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(tmp_path)})
    assert build_info.triton_obstacle().startswith(f"Triton needs Python's header {tmp_path / 'Python.h'}")
    (tmp_path / "Python.h").touch()
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    monkeypatch.setattr(driver, "library_dirs", Mock(side_effect=AssertionError("libcuda.so cannot found!")))
    assert build_info.triton_obstacle().startswith("Triton does not find libcuda.so.1: name its folder in")
    monkeypatch.setattr(driver, "library_dirs", lambda: [str(tmp_path)])
    monkeypatch.setattr(driver, "libraries", ["cuda"])  # of Triton 3.5
    (tmp_path / "libcuda.so.1").touch()
    remedy = f"needs {tmp_path}/libcuda.so to link to: ln -s libcuda.so.1 {tmp_path}/libcuda.so, or a newer Triton"
    assert build_info.triton_obstacle().endswith(remedy)
    monkeypatch.setattr(driver, "libraries", ["libcuda.so.1"])
    assert build_info.triton_obstacle() == ""


@pytest.mark.parametrize("runs", [True, False])
def test_the_search_on_a_gpu_is_what_runs_there(monkeypatch, runs):
    """A driver older than the toolkit, or an older GPU, leaves it to PyTorch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build_info, "has_code", lambda device: runs and device.type == "cuda")
    assert build_info._gpu_search().startswith("native CUDA code" if runs else "PyTorch's matrix products")


@pytest.mark.parametrize(
    ("capability", "version", "shown"),
    [
        ((9, 0), "12.9", "; /triton/ptxas is ptxas 12.9. Before 13.3, ptxas miscompiles some kernels for compute"),
        ((9, 0), "13.3", ""),
        ((8, 0), "12.9", ""),
    ],
)
def test_a_ptxas_with_a_known_fault_is_named(monkeypatch, capability, version, shown):
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(build_info, "triton_obstacle", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    tool = SimpleNamespace(path="/triton/ptxas", version=version)
    for get_ptxas in (lambda arch: tool, lambda: tool):  # as from Triton 3.6 on, and before
        monkeypatch.setattr(compiler, "get_ptxas", get_ptxas)
        found = build_info._attention_on_gpu()
        assert found.startswith(f"Triton's kernels{shown}") and ("install Triton 3.9" in found) == bool(shown)
