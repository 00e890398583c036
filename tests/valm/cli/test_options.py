import argparse

import pytest
import torch

from valm.cli import main
from valm.cli.options import add_device, add_ray, chosen_device, chosen_run
from valm.errors import ValmError


@pytest.mark.parametrize(
    "option",
    [["--thumbnails", "-5"], ["--batch-size", "0"], ["--columns", "x"]],
    ids=lambda o: o[0],
)
def test_fields_that_cannot_be(world, sentence, option):
    """They are found before the CLIP that is not there."""
    sentence(["kb", "build", "{world}/pictures", "--clip", "x", "--out", "{tmp}/x", *option], f"{option[0]} ")


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
    """By itself the GPU that torch has; on a Ray cluster a task has one GPU then."""

    def chosen(*options):
        parser = argparse.ArgumentParser()
        add_device(parser)
        add_ray(parser)
        arguments = parser.parse_args(options)
        return chosen_device(arguments).type, chosen_run(arguments)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device: empty(*size))  # as if there were a GPU
    monkeypatch.setattr("valm.store.ray.RayRun", lambda address, cpus, gpus: (cpus, gpus))
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        for ray in ([], ["--ray", "auto", "--cpus", "2"]):
            assert chosen(*ray)[0] == expected
            assert chosen(*ray, "--device", "cpu")[0] == "cpu"
        assert chosen(*ray)[1] == (2, int(there))
    with pytest.raises(ValmError, match="--device cuda:1 with --ray: a task has one GPU"):
        chosen("--ray", "auto", "--device", "cuda:1")
