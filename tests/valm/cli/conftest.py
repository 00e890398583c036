"""A tiny CLIP's world, in which each command runs, and the check of what a command says of wrong input."""

import os
import shutil

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from tests.valm.cli.commands import SIZE, THINGS, run
from tests.valm.other_tokenizers import chat_like
from tests.valm.tiny_clip import make_clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.evaluation.sets import SETS


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with pictures, a CLIP, a corpus, a table of colours, a knowledge base and two checkpoints."""
    root = tmp_path_factory.mktemp("world")
    texts = [f"the color of the {name} is {color}" for name, color in THINGS.items()]
    (root / "pictures").mkdir()
    for name, color in THINGS.items():
        Image.new("RGB", (40, 40), color).save(root / "pictures" / f"{name}.png")
        (root / "pictures" / f"{name}.txt").write_text(f"a {name}")
    (root / "corpus.txt").write_text("\n".join(texts))
    rows = [f"{i},the ,{name},{color}" for i, (name, color) in enumerate(THINGS.items(), 1)]
    table = root / "sets" / SETS["memory_color"].file
    table.parent.mkdir(parents=True)
    table.write_text("\n".join(["Index,Descriptor,Item,Color", *rows]))
    make_clip(prune_tokenizer(clip_tokenizer(), texts)).save(root / "clip")
    build = ["kb", "build", root / "pictures", "--clip", root / "clip", "--out", root / "kb"]
    assert run(*build) == 0
    assert run("retrieve", root / "corpus.txt", "--kb", root / "kb", "--out", root / "retrieval", "-k", "2") == 0
    assert run("train", "--retrieval", root / "retrieval", "--out", root / "valm", "--kb", root / "kb", *SIZE) == 0
    assert run("train", root / "corpus.txt", "--out", root / "gpt2", "--tokenizer", root / "clip", *SIZE) == 0
    return root


@pytest.fixture(scope="session")
def base(world):
    """A pretrained chat model with a tokenizer of its own, and the corpus retrieved with that."""
    tokenizer = chat_like(["the color of the coal is black"], vocab_size=300)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(world / "base")
    tokenizer.save_pretrained(world / "base")
    retrieve = ["retrieve", world / "corpus.txt", "--kb", world / "kb", "--tokenizer", world / "base", "-k", "2"]
    assert run(*retrieve, "--out", world / "base-retrieval") == 0
    return world / "base"


@pytest.fixture
def copy_of(world, tmp_path):
    """Copies part of the world, to be damaged."""

    def copy(*names):
        for name in names:
            shutil.copytree(world / name, tmp_path / name)
        return tmp_path

    return copy


@pytest.fixture
def alone(copy_of):
    """A renamed model of which nothing says where its images are: {tmp}/alone."""
    root = copy_of("valm")
    (root / "valm").rename(root / "alone")
    (root / "alone" / "_retrieval.json").unlink()


@pytest.fixture
def sentence(world, tmp_path, capsys):
    """Checks that a command fails with one sentence and leaves no model or knowledge base behind.

    In its arguments and what the sentence must say, {world} and {tmp} are the folders. The latter has
    an empty.txt without text.
    """
    (tmp_path / "empty.txt").write_text("\n\n")

    def check(arguments, expected):
        before = set(os.listdir(tmp_path))
        assert run(*(argument.format(world=world, tmp=tmp_path) for argument in arguments)) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("valm: error: ") and expected.format(world=world, tmp=tmp_path) in error
        left = set(os.listdir(tmp_path)) - before
        assert not any((tmp_path / name / "config.json").exists() for name in left)
        assert not any((tmp_path / name / "manifest.json").exists() for name in left)

    return check
