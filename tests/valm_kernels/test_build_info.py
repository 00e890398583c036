import subprocess
import sys

import pytest
import torch

from valm_kernels import show_config


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
    assert line.endswith("generic")


def test_native_code_and_torch_share_one_openmp_runtime():
    # in a process of its own: faiss, which other tests import, brings another runtime along
    code = "from valm_kernels.native import native; native(); import valm_kernels; valm_kernels.show_config()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("OpenMP runtimes")]
    assert line.count("libgomp") == 1
