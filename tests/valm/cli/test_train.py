import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.valm.cli.commands import SIZE, run
from tests.valm.other_tokenizers import gpt2_like
from valm.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def other_tokenizer(world):
    gpt2_like(["the color of the coal is black"], vocab_size=300).save_pretrained(world / "gpt2-tokenizer")
    return world / "gpt2-tokenizer"


def test_a_model_with_a_tokenizer_of_its_own(world, other_tokenizer, tmp_path, capsys):
    """Trained with pictures, saved and loaded, asked, and let go on: as one with CLIP's."""
    corpus, kb = world / "corpus.txt", ["--kb", world / "kb"]
    size = [*SIZE, "--context", "64"]  # of this tokenizer prompts have more tokens
    other = ["--tokenizer", other_tokenizer]
    assert run("train", corpus, *kb, *other, "--out", tmp_path / "valm", "-k", "2", *size) == 0
    model, tokenizer = load_checkpoint(tmp_path / "valm")
    assert model.retriever.encoder.alignment is not None
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    ids = tokenizer("the color of the apple is", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    cached, again = (model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, again)
    capsys.readouterr()
    assert run("generate", tmp_path / "valm", "the color of the apple", "--max-new-tokens", 4) == 0
    assert capsys.readouterr().out.startswith("the color of the apple")
    assert run("eval", tmp_path / "valm", "--memory-color", world / "colors.csv") == 0
    assert "accuracy" in capsys.readouterr().out
    # the same through `valm retrieve`, and the baseline without pictures
    assert run("retrieve", corpus, *kb, *other, "--out", tmp_path / "retrieval", "-k", "2") == 0
    retrieval = ["--retrieval", tmp_path / "retrieval"]
    assert run("train", *retrieval, *kb, "--out", tmp_path / "twice", *size) == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("valm", "twice")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert run("train", corpus, *other, "--out", tmp_path / "gpt2", *size) == 0
    capsys.readouterr()
    assert run("train", *retrieval, *kb, *other, "--out", tmp_path / "never", *size) == 1
    assert "--tokenizer was decided when" in capsys.readouterr().err
    assert run("train", corpus, "--tokenizer", world / "pictures", "--out", tmp_path / "never", *size) == 1
    assert "cannot load the tokenizer" in capsys.readouterr().err


def test_training_on_a_retrieval_is_training_on_its_corpus(world, tmp_path, capsys):
    retrieval = ["train", "--retrieval", world / "retrieval", "--out", tmp_path / "model", *SIZE]
    assert run(*retrieval, "--kb", world / "kb") == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (world / "valm" / name).read_bytes()
    shutil.rmtree(tmp_path / "model")
    assert run(*retrieval) == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        world / "gpt2" / "model.safetensors"
    ).read_bytes()
    # killed, and run again
    assert run("retrieve", world / "corpus.txt", "--kb", world / "kb", "--out", world / "retrieval", "-k", "2") == 0
    assert "6 documents" in capsys.readouterr().out


def wrong_inputs():
    """name -> (arguments, what the sentence must say); {world} and {tmp} are the folders."""
    train = ["train", "{world}/corpus.txt", "--out", "{tmp}/model", *SIZE]
    cached = ["train", "--retrieval", "{world}/retrieval", "--out", "{tmp}/model", *SIZE]
    return {
        "corpus missing": (["train", "{tmp}/none.txt", "--out", "{tmp}/model"], "none.txt"),
        "corpus without text": (["train", "{tmp}/empty.txt", "--out", "{tmp}/model"], "no documents"),
        "corpus not text": (["train", "{world}/pictures/sea.png", "--out", "{tmp}/model"], "is not UTF-8"),
        "impossible heads": ([*train, "--clip", "{world}/clip", "--heads", "5"], "n_embd"),
        "more images than there are": ([*train, "--kb", "{world}/kb", "-k", "7"], "k must be from 1 to the 6"),
        "output of another training": ([*train[:3], "{world}/gpt2", *SIZE], "is not empty"),
        "corpus and retrieval": ([*train, "--retrieval", "{world}/retrieval"], "give either a corpus or --retrieval"),
        "neither corpus nor retrieval": (["train", "--out", "{tmp}/model"], "give either a corpus or --retrieval"),
        "not a retrieval": ([*cached[:2], "{world}/kb", *cached[3:]], "is not the manifest of a corpus retrieval"),
        "no such retrieval": ([*cached[:2], "{tmp}/none", *cached[3:]], "no corpus retrieval at {tmp}/none"),
        "setting of a retrieval": ([*cached, "--query", "eot"], "--query was decided when"),
        "output is a file": ([*train[:3], "{world}/corpus.txt", "--clip", "{world}/clip"], "{world}/corpus.txt"),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_one_sentence(sentence, name):
    arguments, expected = wrong_inputs()[name]
    sentence(arguments, expected)


def test_a_retrieval_from_another_knowledge_base_is_one_sentence(sentence, world, tmp_path):
    run("kb", "merge", world / "kb", world / "kb", "--out", tmp_path / "kb")
    options = ["--retrieval", "{world}/retrieval", "--kb", "{tmp}/kb"]
    sentence(["train", *options, "--out", "{tmp}/model", *SIZE], "from another knowledge base")
