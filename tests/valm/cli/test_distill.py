import json

import pytest

from tests.valm.cli.commands import run
from valm.model.checkpoint import load

FEW = ["--steps", "5", "--batch-size", "4"]


def test_a_distilled_model_generates_and_is_evaluated_without_the_clip(world, copy_of, capsys):
    root = copy_of("valm", "kb", "clip")
    arguments = ["--retrieval", world / "retrieval", "--out", root / "self", *FEW]
    assert run("distill", root / "valm", *arguments) == 0
    assert "tokens held out: cosine" in capsys.readouterr().out
    assert json.loads((root / "self" / "retrieval.json").read_text())["query"] == "self"
    (root / "clip").rename(root / "gone")
    assert run("generate", root / "self", "the color of the apple", "--max-new-tokens", 4) == 0
    assert capsys.readouterr().out.startswith("the color of the apple")
    options = ["--memory-color", world / "colors.csv", "--protocol", "fair", "--random-images", "--json"]
    assert run("eval", root / "self", *options) == 0
    assert "random images" in capsys.readouterr().out
    model, _ = load(root / "self")
    assert model.retriever.encoder.query == "self"


def wrong_inputs():
    """name -> (arguments, what the sentence must say); {world} and {tmp} are the folders."""
    some = ["--retrieval", "{world}/retrieval", "--out", "{tmp}/self", *FEW]
    return {
        "no such checkpoint": (["distill", "{world}/none", *some], "no checkpoint folder {world}/none"),
        "no knowledge base": (["distill", "{world}/gpt2", *some], "names no knowledge base: give it as kb (--kb)"),
        "no images": (["distill", "{world}/gpt2", "--kb", "{world}/kb", *some], "a query head needs retrieved images"),
        "no retrieval": (
            ["distill", "{world}/valm", "--retrieval", "{world}/kb", "--out", "{tmp}/self"],
            "{world}/kb",
        ),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_one_sentence(sentence, name):
    arguments, expected = wrong_inputs()[name]
    sentence(arguments, expected)
