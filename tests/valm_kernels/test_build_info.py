import subprocess
import sys
from types import SimpleNamespace

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
        ({"built_with_cuda": False}, "not built, as nvcc was not found"),
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


def test_native_code_and_torch_share_one_openmp_runtime():
    # in a process of its own: faiss, which other tests import, brings another runtime along
    code = "from valm_kernels.native import native; native(); import valm_kernels; valm_kernels.show_config()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("OpenMP runtimes")]
    assert line.count("libgomp") == 1
