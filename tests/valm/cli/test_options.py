import pytest

from tests.valm.cli.commands import run


@pytest.mark.parametrize("option", ["--thumbnails -5", "--batch-size 0", "--columns x"])
def test_fields_that_cannot_be(sentence, option):
    """They are found before the CLIP that is not there."""
    sentence(f"kb build {{world}}/pictures --clip x --out {{tmp}}/x {option}", option.split()[0] + " ")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate model x --temperature 0", "must be a finite number above 0, got 0"),
        ("generate model x --temperature nan", "must be a finite number above 0, got nan"),
        ("generate model x --top-p 1.5", "must be above 0 and at most 1, got 1.5"),
        ("generate model x -k 0", "must be at least 1, got 0"),
        ("generate model x --seed -1", "must be from 0 to 4294967295, got -1"),
        ("serve model --port 70000", "argument --port: must be from 0 to 65535, got 70000"),
        ("train corpus.txt --out model --steps few", "--steps: invalid int value: 'few'; see `valm train --help`"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_one_sentence(command, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*command.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    "command",
    [
        "kb build {world}/pictures --clip {world}/clip --out {tmp}/kb",
        "kb index {world}/kb --factory IVF1,Flat",
        "kb search {world}/kb x",
        "clip check {world}/pictures --clip {world}/clip",
        "retrieve {world}/corpus.txt --kb {world}/kb --out {tmp}/out",
        "eval {world}/valm --tasks memory_color --data {world}/sets",
        "generate {world}/valm x",
    ],
)
def test_a_device_that_is_not_there_is_one_sentence(sentence, command):
    for device in ("cuda:99", "gpu"):
        error = sentence(f"{command} --device {device}", f"valm: error: there is no device '{device}' here (")
        assert error.endswith("): drop --device, or give cpu")
