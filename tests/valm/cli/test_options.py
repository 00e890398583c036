import argparse

import pytest
import torch

from valm.cli import main
from valm.cli.options import add_device, add_ray, chosen_device
from valm.errors import ValmError


@pytest.mark.parametrize(
    "option", [["--thumbnails", "-5"], ["--batch-size", "0"], ["--gpus", "-1"], ["--cpus", "0"]], ids=lambda o: o[0]
)
def test_numbers_that_cannot_be(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["kb", "build", "x", "--clip", "x", "--out", "x", *option])
    assert stop.value.code == 2 and f"argument {option[0]}" in capsys.readouterr().err


def commands_with_device():
    """name -> arguments of every command that loads a model."""
    return {
        "kb build": ["kb", "build", "{world}/pictures", "--clip", "{world}/clip", "--out", "{tmp}/kb"],
        "kb index": ["kb", "index", "{world}/kb", "--factory", "IVF1,Flat"],
        "kb search": ["kb", "search", "{world}/kb", "x"],
        "clip check": ["clip", "check", "{world}/pictures", "--clip", "{world}/clip"],
        "retrieve": ["retrieve", "{world}/corpus.txt", "--kb", "{world}/kb", "--out", "{tmp}/out"],
        "eval": ["eval", "{world}/valm", "--tasks", "memory_color", "--data", "{world}/sets"],
        "generate": ["generate", "{world}/valm", "x"],
    }


@pytest.mark.parametrize("name", commands_with_device())
def test_a_device_that_is_not_there_is_one_sentence(world, tmp_path, capsys, name):
    arguments = [argument.format(world=world, tmp=tmp_path) for argument in commands_with_device()[name]]
    for device in ("cuda:99", "gpu"):
        assert main([*arguments, "--device", device]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"valm: error: there is no device '{device}' here (")
        assert error.endswith("); drop --device, or give cpu")


def test_the_device_is_chosen(monkeypatch):
    """By itself the GPU that torch has, on a Ray cluster only where its tasks have one."""

    def chosen(*options):
        parser = argparse.ArgumentParser()
        add_device(parser)
        add_ray(parser)
        return chosen_device(parser.parse_args(options)).type

    if not torch.cuda.is_available():
        with pytest.raises(ValmError, match=r"there is no device 'cuda' here \(.*\); drop --gpus"):
            chosen("--ray", "auto", "--gpus", "1")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device: empty(*size))  # as if there were a GPU
    for there, ray, expected in ((False, [], "cpu"), (True, [], "cuda"), (True, ["--ray", "auto"], "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert chosen(*ray) == expected
        assert chosen(*ray, "--device", "cpu") == "cpu"
    assert chosen("--ray", "auto", "--gpus", "1") == "cuda"
    with pytest.raises(ValmError, match="--device cuda with --ray: a task has no GPU; give --gpus 1"):
        chosen("--ray", "auto", "--device", "cuda")
