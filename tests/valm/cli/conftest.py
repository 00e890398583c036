"""A folder with a tiny CLIP, in which each command runs, and a check of the sentences on wrong input."""

import os
import shlex
import shutil

import pytest
from PIL import Image

from tests.valm.cli.commands import SIZE, THINGS, run, serving
from tests.valm.models import llama_of
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
    """A pretrained chat model with its own tokenizer, and the corpus retrieved with that tokenizer."""
    tokenizer = chat_like(["the color of the coal is black"], vocab_size=300)
    llama_of(tokenizer, max_position_embeddings=64).save_pretrained(world / "base")
    tokenizer.save_pretrained(world / "base")
    retrieve = ["retrieve", world / "corpus.txt", "--kb", world / "kb", "--tokenizer", world / "base", "-k", "2"]
    assert run(*retrieve, "--out", world / "base-retrieval") == 0
    return world / "base"


@pytest.fixture(scope="module")
def address(world):
    """The address of a server that the tests of a module share."""
    with serving(world / "valm", "--max-waiting", "200") as (_, address):
        yield address


@pytest.fixture
def copy_of(world, tmp_path):
    """Copies a part of the world that a test may damage."""

    def copy(*names):
        for name in names:
            shutil.copytree(world / name, tmp_path / name)
        return tmp_path

    return copy


@pytest.fixture
def alone(copy_of):
    """A renamed model in {tmp}/alone whose folder does not say where its images are."""
    root = copy_of("valm")
    (root / "valm").rename(root / "alone")
    (root / "alone" / "_retrieval.json").unlink()


@pytest.fixture
def output_of(capsys):
    """Runs a command that succeeds, and returns its output."""

    def output_of(*arguments):
        capsys.readouterr()
        assert run(*arguments) == 0
        return capsys.readouterr().out

    return output_of


@pytest.fixture
def error_of(capsys):
    """Runs a command that fails, and returns its message."""

    def error_of(*arguments):
        capsys.readouterr()
        assert run(*arguments) == 1
        return capsys.readouterr().err

    return error_of


@pytest.fixture
def sentence(world, tmp_path, error_of):
    """Checks that a command line fails with one sentence and leaves no model or knowledge base; returns the sentence.

    In the command line and in the expected words, {world} and {tmp} are the folders. {tmp} contains an empty empty.txt.
    """
    (tmp_path / "empty.txt").write_text("\n\n")

    def check(command, expected):
        before = set(os.listdir(tmp_path))
        words = (word.format(world=world, tmp=tmp_path) for word in shlex.split(command))
        error = error_of(*words).strip().splitlines()[-1]
        assert error.startswith("valm: error: ") and expected.format(world=world, tmp=tmp_path) in error
        left = set(os.listdir(tmp_path)) - before
        assert not any((tmp_path / name / "config.json").exists() for name in left)
        assert not any((tmp_path / name / "manifest.json").exists() for name in left)
        return error

    return check
