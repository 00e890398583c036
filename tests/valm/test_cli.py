"""The valm command on a tiny CLIP: the whole way once, then one sentence for each wrong input."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.valm.other_tokenizers import gpt2_like
from tests.valm.tiny_clip import make_clip
from valm.checkpoint import load_checkpoint
from valm.cli import main
from valm.cli.options import add_device, add_ray, chosen_device
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.tokenizer import clip_tokenizer, prune_tokenizer

THINGS = {"apple": "red", "sea": "blue", "leaf": "green", "lemon": "yellow", "coal": "black", "snow": "white"}
SIZE = ["--layers", "3", "--width", "32", "--heads", "4", "--context", "32", "--steps", "3", "--batch-size", "4"]


@pytest.fixture(scope="module")
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
    (root / "colors.csv").write_text("\n".join(["Index,Descriptor,Item,Color", *rows]))
    make_clip(prune_tokenizer(clip_tokenizer(), texts)).save(root / "clip")
    build = ["kb", "build", root / "pictures", "--clip", root / "clip", "--out", root / "kb"]
    assert run(*build) == 0
    assert run("train", root / "corpus.txt", "--out", root / "valm", "--kb", root / "kb", "-k", "2", *SIZE) == 0
    assert run("retrieve", root / "corpus.txt", "--kb", root / "kb", "--out", root / "retrieval", "-k", "2") == 0
    assert run("train", root / "corpus.txt", "--out", root / "gpt2", "--clip", root / "clip", *SIZE) == 0
    return root


@pytest.fixture(scope="module")
def other_tokenizer(world):
    gpt2_like(["the color of the coal is black"], vocab_size=300).save_pretrained(world / "gpt2-tokenizer")
    return world / "gpt2-tokenizer"


@pytest.fixture
def copy_of(world, tmp_path):
    """Copies part of the world, to be damaged."""

    def copy(*names):
        for name in names:
            shutil.copytree(world / name, tmp_path / name)
        return tmp_path

    return copy


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


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


def test_kb_info_names_size_and_encoder(world, capsys):
    assert run("kb", "info", world / "kb") == 0
    out = capsys.readouterr().out
    assert "6 pictures, 16 dimensions" in out
    assert "the CLIP tiny" in out


def test_kb_search_lists_the_nearest_pictures(world, capsys):
    assert run("kb", "search", world / "kb", "the apple", "-k", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(lines) == 3 and scores == sorted(scores, reverse=True)
    assert all(line.split()[1].removesuffix(".png") in THINGS for line in lines)


def test_what_is_in_a_knowledge_base_does_not_steer_the_terminal(world, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "pictures" / "a\x1b[2J\n.png")
    (tmp_path / "pictures" / "a\x1b[2J\n.txt").write_text("red \x1b]0;title\x07\x9b2J")
    (tmp_path / "pictures" / "b\x1b[2J.png").write_text("no picture")
    build = ["kb", "build", tmp_path / "pictures", "--clip", world / "clip", "--out", tmp_path / "kb"]
    assert run(*build) == run("kb", "search", tmp_path / "kb", "red") == 0
    assert run("kb", "info", tmp_path / "no\x1b[2J\nwhere") == 1
    out, err = capsys.readouterr()
    assert r"a\x1b[2J\n.png" in out and r"red \x1b]0;title\x07" in out and r"b\x1b[2J.png" in out
    assert r"no\x1b[2J\nwhere" in err
    assert all(c.isprintable() or c in "\n\r" for c in out + err)


def test_retrieve_verify(copy_of, capsys):
    root = copy_of("retrieval")
    assert run("retrieve", "--verify", root / "retrieval") == 0
    assert "6 documents are as they were written" in capsys.readouterr().out
    file = root / "retrieval" / "tokens-00000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert run("retrieve", "--verify", root / "retrieval") == 1
    assert "is damaged, retrieve it again: tokens-00000.npy" in capsys.readouterr().err
    assert run("train", "--retrieval", root / "retrieval", "--out", root / "model", *SIZE) == 1
    assert "is damaged, retrieve it again: tokens-00000.npy" in capsys.readouterr().err


def test_kb_search_draws_a_contact_sheet(world, tmp_path, capsys):
    assert run("kb", "search", world / "kb", "the apple", "--sheet", tmp_path / "sheet.png") == 0
    assert Image.open(tmp_path / "sheet.png").width > 400


def test_kb_verify_and_merge(world, tmp_path, capsys):
    assert run("kb", "verify", world / "kb") == 0
    assert "all 6 pictures are as they were written" in capsys.readouterr().out
    assert run("kb", "merge", world / "kb", world / "kb", "--out", tmp_path / "both") == 0
    assert "12 pictures" in capsys.readouterr().out
    vectors = bytearray((tmp_path / "both" / "vectors-00001.npy").read_bytes())
    vectors[-1] ^= 1
    (tmp_path / "both" / "vectors-00001.npy").write_bytes(vectors)
    assert run("kb", "verify", tmp_path / "both") == 1
    assert "is damaged, build it again: vectors-00001.npy" in capsys.readouterr().err


def test_kb_index(copy_of, capsys):
    pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")
    root = copy_of("kb", "clip", "valm")
    assert run("kb", "index", root / "kb") == 0
    assert "searched exactly" in capsys.readouterr().out  # there are few pictures
    options = ["--factory", "IVF2,Flat", "-k", 1, "--target-recall", 1]
    assert run("kb", "index", root / "kb", *options) == 0
    out = capsys.readouterr().out
    assert "searched through the index IVF2,Flat, nprobe=" in out
    assert "eot queries at the tokens of captions of the pictures" in out
    assert run("kb", "info", root / "kb") == 0
    assert capsys.readouterr().out == out
    (root / "questions.txt").write_text("the color of the sea\n\nthe color of the coal\n")
    assert run("kb", "index", root / "kb", *options, "--queries", root / "questions.txt", "--query", "state") == 0
    assert "state queries at the tokens of questions.txt" in capsys.readouterr().out
    assert run("kb", "search", root / "kb", "the apple", "-k", 2) == 0
    assert run("generate", root / "valm", "the sea", "--max-new-tokens", 2) == 0
    (root / "kb" / "index.faiss").write_bytes(b"")
    for command in (["kb", "search", root / "kb", "the apple"], ["generate", root / "valm", "the sea"]):
        assert run(*command) == 1
        assert f"make it anew with `valm kb index {root / 'kb'}`" in capsys.readouterr().err.replace("valm/../", "")
    assert run("kb", "verify", root / "kb") == 1
    assert "index.faiss" in capsys.readouterr().err
    assert run("kb", "index", root / "kb") == 0
    assert "searched exactly" in capsys.readouterr().out
    assert not list((root / "kb").glob("index.*"))


def test_kb_build_from_archives(world, tmp_path, capsys):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "00000.tar", "w") as tar:
        for file in sorted((world / "pictures").iterdir()):
            tar.add(file, file.name)
    for source in ("tars", "tars/00000.tar"):
        build = ["kb", "build", tmp_path / source, "--clip", world / "clip", "--out", tmp_path / f"kb-{source[-3:]}"]
        assert run(*build, "--format", "webdataset") == 0
        assert "6 pictures" in capsys.readouterr().out


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


def test_kb_build_from_a_dataset(world, tmp_path, capsys):
    rows = {"picture": sorted(map(str, (world / "pictures").glob("*.png"))), "words": list(THINGS)}
    dataset = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "dataset")
    build = ["kb", "build", tmp_path / "dataset", "--clip", world / "clip", "--out", tmp_path / "kb"]
    named = ["--split", "test", "--image-column", "picture", "--caption-column", "words"]
    assert run(*build, "--format", "huggingface", *named) == 0
    assert "6 pictures" in capsys.readouterr().out
    assert ImageKnowledgeBase.open(tmp_path / "kb").item(0).caption == "apple"
    for options, message in (
        ([], "--split is for --format huggingface, not for pictures"),
        (["--format", "huggingface", "--captions", "x.csv"], "--captions is for --format pictures"),
    ):
        assert run(*build, *named, *options) == 1
        assert message in capsys.readouterr().err
    assert run(*build, "--format", "huggingface") == 1
    assert "has no split 'train', only test" in capsys.readouterr().err


def test_encoder_check(world, tmp_path, capsys):
    check = ["encoder", "check", "--clip", world / "clip"]
    assert run(*check, world / "pictures") == 0
    out = capsys.readouterr().out
    assert "6 pictures with 6 captions" in out and "image to text  recall@10" in out and "zero-shot" not in out
    for name, color in THINGS.items():
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(3 if name != "coal" else 2):
            Image.new("RGB", (40, 40), color).save(tmp_path / "classes" / name / f"{number}.png")
    (tmp_path / "templates.txt").write_text("the {}\n")
    options = ["--templates", tmp_path / "templates.txt", "--out", tmp_path / "check.json"]
    assert run(*check, tmp_path / "classes", *options) == 0
    out = capsys.readouterr().out
    assert "17 pictures of 6 classes, chance 0.167" in out and "left out: a class has fewer than 3" in out
    assert json.loads((tmp_path / "check.json").read_text())["retrieval"] is None
    Image.new("RGB", (40, 40)).save(tmp_path / "classes" / "coal" / "2.png")
    assert run(*check, tmp_path / "classes") == 0
    assert "linear probe  1.000" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["valm", "gpt2"])
def test_eval_prints_accuracies_and_writes_the_answers(world, tmp_path, capsys, model):
    out = tmp_path / "answers.json"
    assert run("eval", world / model, "--memory-color", world / "colors.csv", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "MemoryColor, 6 things, 9 prompts, fair protocol" in printed
    answers = json.loads(out.read_text())["MemoryColor"]
    assert f"{answers['accuracy']['value']:.3f}" in printed
    assert len(answers["predictions"]) == 6


@pytest.mark.parametrize("options", [[], ["--beams", "2"], ["--sample", "--seed", "3"]])
def test_generate_continues_the_prompt(world, capsys, options):
    assert run("generate", world / "valm", "the color of the apple", "--max-new-tokens", 4, *options) == 0
    assert capsys.readouterr().out.startswith("the color of the apple")


def test_checkpoint_and_knowledge_base_move_together(copy_of, capsys):
    root = copy_of("valm", "kb", "clip")
    assert run("generate", root / "valm", "the sea", "--max-new-tokens", 2) == 0


def test_every_command_answers_help(capsys):
    for command in (
        ["demo"],
        ["kb"],
        ["kb", "build"],
        ["encoder", "check"],
        ["retrieve"],
        ["train"],
        ["eval"],
        ["generate"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0


def test_help_does_not_wait_for_torch():
    script = "import sys, valm.cli; valm.cli.build_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def wrong_inputs():
    """name -> (arguments, what the sentence must say); {world} and {tmp} are the folders."""
    kb_build = ["kb", "build", "{world}/pictures", "--clip", "{world}/clip", "--out", "{tmp}/kb"]
    train = ["train", "{world}/corpus.txt", "--out", "{tmp}/model", *SIZE]
    retrieve = ["retrieve", "{world}/corpus.txt", "--kb", "{world}/kb", "--out", "{tmp}/out"]
    cached = ["train", "--retrieval", "{world}/retrieval", "--out", "{tmp}/model", *SIZE]
    return {
        "folder of pictures missing": ([*kb_build[:2], "{tmp}/none", *kb_build[3:]], "no folder {tmp}/none"),
        "folder without pictures": ([*kb_build[:2], "{tmp}", *kb_build[3:]], "no pictures in {tmp}"),
        "no tar files": ([*kb_build, "--format", "webdataset"], "no tar files in {world}/pictures"),
        "no embeddings": ([*kb_build, "--format", "embeddings"], "no embeddings in {world}/pictures"),
        "captions of archives": ([*kb_build, "--format", "webdataset", "--captions", "x.csv"], "--captions is for"),
        "sheet of no known kind": (
            ["kb", "search", "{world}/kb", "x", "--sheet", "{tmp}/sheet.abc"],
            "cannot write the picture {tmp}/sheet.abc: unknown file extension",
        ),
        "no such CLIP": ([*kb_build[:4], "{tmp}/none", *kb_build[5:]], "no CLIP at '{tmp}/none'"),
        "output holds something else": ([*kb_build[:-1], "{world}/clip"], "is not empty"),
        "pictures without labels": (["encoder", "check", "{tmp}/bare", "--clip", "{world}/clip"], "nothing to check"),
        "template without a place": (
            ["encoder", "check", "{world}/pictures", "--clip", "{world}/clip", "--templates", "{world}/corpus.txt"],
            "has no {{}} for the name",
        ),
        "no such knowledge base": (["kb", "info", "{tmp}/none"], "no knowledge base at {tmp}/none"),
        "index of no known kind": (["kb", "index", "{world}/kb", "--factory", "IFV1"], "the factory string 'IFV1'"),
        "index of too many cells": (
            ["kb", "index", "{world}/kb", "--factory", "IVF7,Flat"],
            "of 7 cells needs as many",
        ),
        "queries not text": (
            ["kb", "index", "{world}/kb", "--factory", "IVF1,Flat", "--queries", "{world}/pictures/sea.png"],
            "sea.png is not UTF-8",
        ),
        "queries without text": (
            ["kb", "index", "{world}/kb", "--factory", "IVF1,Flat", "--queries", "{tmp}/empty.txt"],
            "no text to make queries of",
        ),
        "not a knowledge base": (["kb", "search", "{world}/clip", "x"], "is not a knowledge base"),
        "knowledge base of another CLIP": (
            ["kb", "search", "{world}/kb", "x", "--clip", "{tmp}/other"],
            "was built with",
        ),
        "corpus missing": (["train", "{tmp}/none.txt", "--out", "{tmp}/model"], "none.txt"),
        "corpus without text": (["train", "{tmp}/empty.txt", "--out", "{tmp}/model"], "no documents"),
        "corpus not text": (["train", "{world}/pictures/sea.png", "--out", "{tmp}/model"], "is not UTF-8"),
        "impossible heads": ([*train, "--clip", "{world}/clip", "--heads", "5"], "n_embd"),
        "more images than there are": ([*train, "--kb", "{world}/kb", "-k", "7"], "k must be from 1 to the 6"),
        "output of another training": ([*train[:3], "{world}/gpt2", *SIZE], "is not empty"),
        "corpus to retrieve missing": (["retrieve", "{tmp}/none", *retrieve[2:]], "there is no corpus file {tmp}/none"),
        "corpus to retrieve empty": (["retrieve", "{tmp}/empty.txt", *retrieve[2:]], "the corpus has no documents"),
        "retrieval into something else": ([*retrieve[:-1], "{world}/clip"], "is not empty"),
        "retrieval of other settings": ([*retrieve[:-1], "{world}/retrieval"], "(k differ)"),
        "retrieval without knowledge base": ([*retrieve[:3], "{world}/clip", *retrieve[4:]], "is not a knowledge base"),
        "more images than there are, retrieved": ([*retrieve, "-k", "7"], "k must be from 1 to the 6"),
        "search actors without ray": ([*retrieve, "--search-actors", "2"], "give --ray too"),
        "corpus and retrieval": ([*train, "--retrieval", "{world}/retrieval"], "give either a corpus or --retrieval"),
        "neither corpus nor retrieval": (["train", "--out", "{tmp}/model"], "give either a corpus or --retrieval"),
        "not a retrieval": ([*cached[:2], "{world}/kb", *cached[3:]], "is not the manifest of a corpus retrieval"),
        "no such retrieval": ([*cached[:2], "{tmp}/none", *cached[3:]], "no corpus retrieval at {tmp}/none"),
        "setting of a retrieval": ([*cached, "--query", "eot"], "--query was decided when"),
        "retrieval of another knowledge base": ([*cached, "--kb", "{tmp}/kb"], "from another knowledge base"),
        "no such checkpoint": (["generate", "{tmp}/none", "x"], "no checkpoint folder {tmp}/none"),
        "not a checkpoint": (["generate", "{world}/kb", "x"], "is no checkpoint"),
        "pictures for a model without": (["generate", "{world}/gpt2", "x", "--kb", "{world}/kb"], "sees no pictures"),
        "nothing to evaluate": (["eval", "{world}/gpt2"], "--memory-color"),
        "table missing": (["eval", "{world}/gpt2", "--memory-color", "{tmp}/none.csv"], "none.csv"),
        "table of something else": (["eval", "{world}/gpt2", "--memory-color", "{world}/corpus.txt"], "columns"),
        "output is a file": ([*train[:3], "{world}/corpus.txt", "--clip", "{world}/clip"], "{world}/corpus.txt"),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_one_sentence(world, tmp_path, capsys, name):
    (tmp_path / "empty.txt").write_text("\n\n")
    if "{tmp}/bare" in wrong_inputs()[name][0]:
        (tmp_path / "bare").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "bare" / "x.png")
    if "{tmp}/other" in wrong_inputs()[name][0]:
        make_clip(prune_tokenizer(clip_tokenizer(), ["another"]), seed=1).save(tmp_path / "other")
    if "{tmp}/kb" in wrong_inputs()[name][0] and name.startswith("retrieval"):
        run("kb", "merge", world / "kb", world / "kb", "--out", tmp_path / "kb")
    arguments, expected = wrong_inputs()[name]
    arguments = [argument.format(world=world, tmp=tmp_path) for argument in arguments]
    before = sorted(os.listdir(tmp_path))
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("valm: error: ") and expected.format(world=world, tmp=tmp_path) in error
    left = set(os.listdir(tmp_path)) - set(before)
    assert not any((tmp_path / name / "config.json").exists() for name in left)
    assert not any((tmp_path / name / "manifest.json").exists() for name in left)


def test_a_config_of_another_model_is_one_sentence(copy_of, capsys):
    root = copy_of("gpt2")
    config = json.loads((root / "gpt2" / "config.json").read_text())
    (root / "gpt2" / "config.json").write_text(json.dumps(config | {"n_embd": 64}))
    assert run("generate", root / "gpt2", "x") == 1
    assert "are not those of its config.json" in capsys.readouterr().err


def test_a_corrupt_picture_is_named_and_left_out(world, tmp_path, capsys):
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "sea.png").write_bytes(b"not a picture")
    assert run("kb", "build", tmp_path / "pictures", "--clip", world / "clip", "--out", tmp_path / "kb") == 0
    out = capsys.readouterr().out
    assert "5 pictures" in out and "sea.png" in out


def test_of_many_corrupt_pictures_some_are_named(world, tmp_path, capsys):
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    for number in range(12):
        (tmp_path / "pictures" / f"{number:02d}.png").write_bytes(b"not a picture")
    assert run("kb", "build", tmp_path / "pictures", "--clip", world / "clip", "--out", tmp_path / "kb") == 0
    out = capsys.readouterr().out
    assert "12 pictures or captions could not be read" in out and "09.png" in out and "10.png" not in out
    assert f"and 2 more, in {tmp_path / 'kb'}/skipped-*.json" in out


@pytest.mark.parametrize(
    "option", [["--thumbnails", "-5"], ["--batch-size", "0"], ["--gpus", "-1"], ["--cpus", "0"]], ids=lambda o: o[0]
)
def test_numbers_that_cannot_be(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["kb", "build", "x", "--clip", "x", "--out", "x", *option])
    assert stop.value.code == 2 and f"argument {option[0]}" in capsys.readouterr().err


def commands_with_device():
    """name -> arguments of every command that loads a model."""
    return {
        "kb build": ["kb", "build", "{world}/pictures", "--clip", "{world}/clip", "--out", "{tmp}/kb"],
        "kb index": ["kb", "index", "{world}/kb", "--factory", "IVF1,Flat"],
        "kb search": ["kb", "search", "{world}/kb", "x"],
        "encoder check": ["encoder", "check", "{world}/pictures", "--clip", "{world}/clip"],
        "retrieve": ["retrieve", "{world}/corpus.txt", "--kb", "{world}/kb", "--out", "{tmp}/out"],
        "train": ["train", "{world}/corpus.txt", "--kb", "{world}/kb", "--out", "{tmp}/model", *SIZE],
        "eval": ["eval", "{world}/valm", "--memory-color", "{world}/colors.csv"],
        "generate": ["generate", "{world}/valm", "x"],
    }


@pytest.mark.parametrize("name", commands_with_device())
def test_a_device_that_is_not_there_is_one_sentence(world, tmp_path, capsys, name):
    arguments = [argument.format(world=world, tmp=tmp_path) for argument in commands_with_device()[name]]
    for device in ("cuda:99", "gpu"):
        assert main([*arguments, "--device", device]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"valm: error: there is no device '{device}' here (")
        assert error.endswith("); leave --device out, or give cpu")


def test_the_device_is_chosen(monkeypatch):
    """By itself the GPU that torch has, on a Ray cluster only where its tasks have one."""

    def chosen(*options):
        parser = argparse.ArgumentParser()
        add_device(parser)
        add_ray(parser)
        return chosen_device(parser.parse_args(options)).type

    if not torch.cuda.is_available():
        with pytest.raises(ValmError, match=r"there is no device 'cuda' here \(.*\); leave --gpus out"):
            chosen("--ray", "auto", "--gpus", "1")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device: empty(*size))  # as if there were a GPU
    for there, ray, expected in ((False, [], "cpu"), (True, [], "cuda"), (True, ["--ray", "auto"], "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert chosen(*ray) == expected
        assert chosen(*ray, "--device", "cpu") == "cpu"
    assert chosen("--ray", "auto", "--gpus", "1") == "cuda"
    with pytest.raises(ValmError, match="--device cuda with --ray: a task has no GPU; give --gpus 1"):
        chosen("--ray", "auto", "--device", "cuda")


def test_the_command_itself_has_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "valm", "kb", "info", tmp_path / "none"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("valm: error: ")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is what is told")
def test_memory_that_is_freed_is_used_again():
    """By a command: 50 MB that are taken and freed again and again are no fresh pages each time."""
    code = """
import ctypes, resource, sys, torch
from valm.cli import M_MMAP_THRESHOLD, keep_freed_memory
if not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**30):
    sys.exit("refused")
keep_freed_memory()
for n in range(11):
    if n == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12_500_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "refused" in done.stderr:
        pytest.skip("this glibc is too old")
    assert done.returncode == 0, done.stderr
    faults = float(done.stdout)
    assert faults < 0.1 * 50_000_000 / os.sysconf("SC_PAGE_SIZE")
