import torch

from valm_kernels import show_config


def test_show_config_prints_what_it_returns(capsys):
    text = show_config()
    assert capsys.readouterr().out.strip() == text
    for name in ("torch", "native module", "CUDA in the native module", "Triton", "OpenMP runtimes"):
        assert any(line.startswith(name) for line in text.splitlines()), name
    assert torch.__version__ in text


def test_native_code_and_torch_share_one_openmp_runtime():
    (line,) = [line for line in show_config().splitlines() if line.startswith("OpenMP runtimes")]
    assert line.count("libgomp") == 1
