import json

import pytest

from tests.valm.cli.commands import run


@pytest.mark.parametrize("model", ["valm", "gpt2"])
def test_eval_prints_accuracies_and_writes_the_answers(world, tmp_path, capsys, model):
    out = tmp_path / "answers.json"
    assert run("eval", world / model, "--memory-color", world / "colors.csv", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "MemoryColor, 6 things, 9 prompts, fair protocol" in printed
    answers = json.loads(out.read_text())["MemoryColor"]
    assert f"{answers['accuracy']['value']:.3f}" in printed
    assert len(answers["predictions"]) == 6


def wrong_inputs():
    """name -> (arguments, what the sentence must say); {world} and {tmp} are the folders."""
    return {
        "nothing to evaluate": (["eval", "{world}/gpt2"], "--memory-color"),
        "table missing": (["eval", "{world}/gpt2", "--memory-color", "{tmp}/none.csv"], "none.csv"),
        "table of something else": (["eval", "{world}/gpt2", "--memory-color", "{world}/corpus.txt"], "columns"),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_one_sentence(sentence, name):
    arguments, expected = wrong_inputs()[name]
    sentence(arguments, expected)
