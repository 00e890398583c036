import json

import pytest
import torch

from tests.valm.cli.commands import run
from valm.model.checkpoint import load


@pytest.mark.parametrize("options", [[], ["--beams", "2"], ["--sample", "--seed", "3"]])
def test_generate_continues_the_prompt(world, capsys, options):
    assert run("generate", world / "valm", "the color of the apple", "--max-new-tokens", 4, *options) == 0
    assert capsys.readouterr().out.startswith("the color of the apple")


@pytest.mark.parametrize(("words", "new"), [(60, 4), (29, 4), (60, 1000), (1, 1000)])
def test_a_prompt_longer_than_the_context_is_shortened(world, capsys, words, new):
    prompt = " ".join(["apple"] * words)
    assert run("generate", world / "valm", prompt, "--max-new-tokens", new) == 0
    out, err = capsys.readouterr()
    room = max(32 - new, 16)
    assert out.startswith(" ".join(["apple"] * min(words, room - 1)))
    assert (f"the model reads 32 tokens: the prompt is cut to its first token and its last {room - 1}" in err) == (
        words + 1 > room
    )


def test_the_text_tower_in_another_precision(world, capsys, monkeypatch):
    assert run("generate", world / "valm", "the sea", "--max-new-tokens", 2, "--query-dtype", "bfloat16") == 0
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert run("generate", world / "valm", "the sea", "--query-dtype", "int8") == 1
    assert "this processor has no AVX-512 VNNI" in capsys.readouterr().err
    model, _ = load(world / "valm", query_dtype=torch.bfloat16)
    assert model.retriever.encoder.tower.dtype == torch.bfloat16


def test_images_only_from_a_score_on(world, tmp_path, capsys):
    """A number, and one chosen from texts; what the model says follows the images that are left."""
    ask = ["explain", world / "valm", "the color of the apple is", "--out", tmp_path / "page.html"]

    def page(*options):
        assert run(*ask, *options) == 0
        return (tmp_path / "page.html").read_text()

    whole, same, without = page(), page("--min-score", "-1"), page("--min-score", "2")
    assert whole == same != without
    (tmp_path / "questions.txt").write_text("the color of the apple is\nthe color of the sea is")
    chosen = page("--min-score", "auto", "--questions", tmp_path / "questions.txt")
    assert chosen not in (whole, without)
    generate = ["generate", world / "valm", "the color of the apple", "--max-new-tokens", 4]
    assert run(*generate, "--min-score", "0.5") == 0
    capsys.readouterr()
    for options, message in (
        (["--min-score", "auto"], "give either --questions or --ordinary-text"),
        (["--questions", tmp_path / "questions.txt"], "give --min-score auto with them"),
        (["--min-score", "nan"], "min_score must be a finite number"),
    ):
        assert run(*generate, *options) == 1
        assert message in capsys.readouterr().err
    with pytest.warns(UserWarning, match="--min-score changes nothing of .*gpt2, which retrieves no images"):
        assert run("generate", world / "gpt2", "the sea", "--max-new-tokens", 2, "--min-score", "0.5") == 0


def test_checkpoint_and_knowledge_base_move_together(copy_of, capsys):
    root = copy_of("valm", "kb", "clip")
    assert run("generate", root / "valm", "the sea", "--max-new-tokens", 2) == 0


def wrong_inputs():
    """name -> (arguments, what the sentence must say); {world} and {tmp} are the folders."""
    return {
        "no such checkpoint": (["generate", "{tmp}/none", "x"], "no checkpoint folder {tmp}/none"),
        "not a checkpoint": (["generate", "{world}/kb", "x"], "is no checkpoint"),
        "pictures for a model without": (["generate", "{world}/gpt2", "x", "--kb", "{world}/kb"], "sees no images"),
    }


def test_a_seed_below_0_is_no_traceback(world, capsys):
    with pytest.raises(SystemExit) as stop:
        run("generate", world / "valm", "x", "--sample", "--seed", "-1")
    assert stop.value.code == 2 and "-1 is not from 0 to 4294967295" in capsys.readouterr().err


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_one_sentence(sentence, name):
    arguments, expected = wrong_inputs()[name]
    sentence(arguments, expected)


def test_a_config_of_another_model_is_one_sentence(copy_of, capsys):
    root = copy_of("gpt2")
    config = json.loads((root / "gpt2" / "config.json").read_text())
    (root / "gpt2" / "config.json").write_text(json.dumps(config | {"n_embd": 64}))
    assert run("generate", root / "gpt2", "x") == 1
    assert "are not those of its config.json" in capsys.readouterr().err
