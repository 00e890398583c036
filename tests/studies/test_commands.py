"""The commands of the studies: python -m studies.demo and python -m studies.color."""

import pytest

from studies.color.__main__ import build_parser as color_parser
from studies.demo.__main__ import build_parser as demo_parser
from valm.cli import run_command


@pytest.mark.parametrize(
    ("parser", "command"),
    [(demo_parser, "python -m studies.demo"), (color_parser, "python -m studies.color run study.yaml")],
)
def test_what_one_process_does_is_refused_to_several(parser, command, tmp_path, monkeypatch, capsys):
    """As torchrun launches them: each would write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    assert run_command(parser(), [*command.split()[3:], "--out", "out"]) == 1
    error = capsys.readouterr().err
    program = command.removesuffix(" study.yaml")
    assert error.startswith("python -m studies") and f"{program} runs in one process, but 2 were launched" in error
    assert not list(tmp_path.iterdir())
