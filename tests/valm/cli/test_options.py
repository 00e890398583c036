import pytest

from valm.cli import main


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
