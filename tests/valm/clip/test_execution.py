"""`Execution`."""

import pytest
import torch

from valm.clip.execution import Execution
from valm.errors import ValmError
from valm.store.shards import run_here


def test_the_device_is_chosen(monkeypatch):
    """By itself the GPU that torch has; on a Ray cluster a task has one GPU then."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device: empty(*size))  # as if there were a GPU
    monkeypatch.setattr("valm.store.ray.RayRun", lambda address, cpus, gpus: (address, cpus, gpus))
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        for ray in (None, "auto"):
            assert Execution(ray=ray).opened_device().type == expected
            assert Execution(ray=ray, device="cpu").opened_device().type == "cpu"
        assert Execution(ray="auto", cpus=2).runner() == ("auto", 2, int(there))
    assert Execution(device="cuda:1").opened_device().index == 1 and Execution().runner() is run_here
    with pytest.raises(ValmError, match="--device cuda:1 with --ray: a task has only one GPU"):
        Execution(ray="auto", device="cuda:1").opened_device()
    with pytest.raises(ValmError, match="--cpus is 0, expected at least 1"):
        Execution(cpus=0)
