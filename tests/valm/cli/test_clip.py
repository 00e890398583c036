import json

import pytest
import torch

from tests.valm.cli.commands import run
from tests.valm.tiny_clip import TINY
from valm.clip.clip import Clip


def test_a_clip_is_trained_and_checked(world, tmp_path, capsys):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    train = ["clip", "train", world / "pictures", "--steps", 40, "--batch-size", 6, "--lr", 3e-3]
    assert run(*train, "--model", tmp_path / "tiny.json", "--out", tmp_path / "clip") == 0
    assert "6 images; loss" in capsys.readouterr().out
    assert run("encoder", "check", world / "pictures", "--clip", tmp_path / "clip") == 0
    assert "text to image  recall@1" in capsys.readouterr().out
    # its image side frozen, and a new text side; the result builds a knowledge base
    assert run(*train, "--image-tower", tmp_path / "clip", "--out", tmp_path / "lit", "--prefixes", 1) == 0
    assert run("kb", "build", world / "pictures", "--clip", tmp_path / "lit", "--out", tmp_path / "kb") == 0
    assert run(*train, "--image-tower", tmp_path / "clip", "--cache-images", "--out", tmp_path / "cached") == 0
    assert Clip.load(tmp_path / "cached").encode_images(torch.zeros(1, 3, 32, 32)).shape == (1, TINY["embed_dim"])


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_training_leaves_no_empty_folder(world, tmp_path, monkeypatch, capsys, there):
    """Nor one that was there before is removed."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    monkeypatch.setattr("valm.training.clip.train_clip", interrupted)
    out = tmp_path / "new" / "clip"
    if there:
        out.mkdir(parents=True)
    assert run("clip", "train", world / "pictures", "--model", tmp_path / "tiny.json", "--out", out) == 130
    assert "interrupted" in capsys.readouterr().err
    assert out.is_dir() == out.parent.is_dir() == there


def wrong_inputs():
    """name -> (arguments, what the sentence must say); {world} and {tmp} are the folders."""
    train = ["clip", "train", "{world}/pictures", "--out", "{tmp}/clip"]
    return {
        "neither model nor tower": (train, "give --model, --image-tower, or both"),
        "nothing is frozen": (
            [*train, "--model", "ViT-B-32", "--cache-images"],
            "--cache-images is for a frozen image tower",
        ),
        "no such architecture": ([*train, "--model", "ViT-Z"], "open_clip has no architecture named 'ViT-Z'"),
        "no such tower": ([*train, "--image-tower", "{tmp}/none"], "no CLIP at"),
        "no such configuration": ([*train, "--model", "{tmp}/none.json"], "none.json"),
        "no pictures": (["clip", "train", "{tmp}/none", *train[3:], "--model", "ViT-B-32"], "{tmp}/none"),
        "output of another run": ([*train[:-1], "{world}/clip", "--model", "ViT-B-32"], "is not empty"),
        "option of another format": (
            [*train, "--model", "ViT-B-32", "--split", "test"],
            "--split is for --format huggingface",
        ),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_one_sentence(sentence, name):
    arguments, expected = wrong_inputs()[name]
    sentence(arguments, expected)


@pytest.mark.parametrize("option", [["--lr", "0"], ["--lr", "nan"], ["--prefixes", "1.5"], ["--max-logit-scale", "-1"]])
def test_numbers_out_of_range_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        run("clip", "train", "pictures", "--out", "clip", "--model", "ViT-B-32", *option)
    assert "is not" in capsys.readouterr().err
