from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.csrc.topk.cuda.simulator import NoStream, OnDevice, Simulator, build
from tests.once import made_once
from valm_kernels.topk import cuda


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("the simulated CUDA kernels need g++")
    made = made_once(tmp_path_factory, "simulator", lambda folder: build(folder / "kernels.so"))
    return made / "kernels.so"


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Simulator]:
    """simulate(library, ...): lets valm_kernels.topk.cuda run on a Simulator, with CPU tensors."""

    def start(library: Path, *arguments, **options) -> Simulator:
        simulator = Simulator(library, *arguments, **options)
        monkeypatch.setattr(cuda, "native", lambda: simulator)
        monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
        monkeypatch.setattr(torch.cuda, "device", OnDevice)
        return simulator

    return start
