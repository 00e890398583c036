import os

import pytest

from valm.cli import build_parser
from valm.errors import ValmError


@pytest.mark.parametrize(
    "content, message",
    [
        ("out: a\nsteps: &x [1]\nlr: *x", r"has an alias \(\*NAME\), which is not read"),
        ("steps: " + "[" * 1500, "cannot be read"),  # deeper than Python's stack; YAML takes time by the square
        ("seed: 2026-99-99", "cannot be read"),
        ("out: !!python/name:os.system", "cannot be read"),
        ('out: "a\\0b"', r"a value that no option can have: 'a\\x00b'"),
        ('out: "\\ud800"', "a value that no option can have"),
        ("steps: 0x" + "f" * 9999, "a value that no option can have: a number of more than 60 digits"),
        ("- steps", "is no list of options"),
        ("resume: off-by-one", "has resume: off-by-one, expected true or false"),
        ("step: 3", r"unknown field 'step', did you mean steps\?"),
        ("layerz: 3", r"unknown field 'layerz', did you mean layer or layers\?"),
    ],
)
def test_what_is_no_config_is_one_sentence(tmp_path, content, message):
    (tmp_path / "train.yaml").write_text(content)
    with pytest.raises(ValmError, match=message):
        build_parser().parse_args(["train", "corpus.txt", "--config", str(tmp_path / "train.yaml")])


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train.yaml")
    with pytest.raises(ValmError, match="is a pipe, not a file"):
        build_parser().parse_args(["train", "corpus.txt", "--config", str(tmp_path / "train.yaml")])


def test_its_option_has_no_short_form(tmp_path, capsys):
    (tmp_path / "train.yaml").write_text("out: a")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["train", "corpus.txt", "--conf", str(tmp_path / "train.yaml")])
    assert "--conf" in capsys.readouterr().err
