"""The whole command on drawn pictures and a tiny decoder, killed in every stage."""

import json
import signal
import subprocess
import sys

import pytest

import valm
from tests.valm.cli.commands import run
from tests.valm.pictures.conftest import draw
from tests.valm.tiny_clip import make_clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.pictures.making import PARTS

STAGES = ["clip", "kb", "retrieval", "model", "control", "report"]
# Runs the command in argv[3:], and kills itself before call argv[2] of function argv[1].
KILLED = """
import importlib, os, signal, sys
from valm.cli import main
module, name = sys.argv[1].split(":")
owner = importlib.import_module(module)
if "." in name:
    of, name = name.split(".")
    owner = getattr(owner, of)
called, calls = getattr(owner, name), []
def counted(*arguments, **options):
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    return called(*arguments, **options)
setattr(owner, name, counted)
sys.exit(main(sys.argv[3:]))
"""
NOTED, SAVED = "valm.store.stages:write_json", "valm.training.image_trainer:ImageTrainer._save_checkpoint"


def killed(at, call, command):
    run = [sys.executable, "-c", KILLED, at, str(call), *map(str, command)]
    return subprocess.run(run, capture_output=True).returncode == -signal.SIGKILL


@pytest.mark.slow  # it starts processes, which train
@pytest.mark.timeout(1800)
def test_killed_in_every_stage_it_gives_the_same_model(drawn, decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_clip(prune_tokenizer(clip_tokenizer(), ["a red ellipse on a green ground"])).save(tmp_path / "clip")
    command = ["pictures", drawn, "--model", decoder, "--clip", "clip", "--steps", 12]
    assert run(*command, "--out", "whole") == 0
    for number, stage in enumerate(STAGES):
        trains = stage in ("model", "control")
        if trains:
            assert killed(SAVED, 2, [*command, "--out", "out"])  # in the middle of the training
        # before the stage is noted as finished; the stage before is noted first, unless the line above did that
        assert killed(NOTED, 0 if trains or number == 0 else 1, [*command, "--out", "out"])
        noted = json.loads((tmp_path / "out" / "stages.json").read_text()) if number else {}
        assert list(noted) == STAGES[:number]
    capsys.readouterr()
    assert run(*command, "--out", "out") == 0
    said = capsys.readouterr().out
    assert said.count("finished before") == 5 and "perplexity of texts that no training has read" in said
    for part in ("model", PARTS["control"]):
        files = [tmp_path / out / part / "image_fusion.safetensors" for out in ("whole", "out")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "out" / "below").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/") > 3 and "<script" not in page
    model, _ = valm.load("out")
    assert len(model.retriever.kb) == 24


@pytest.mark.slow  # it trains two models
def test_pictures_without_captions_with_a_clip_a_text_and_questions(decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "photos", 6, captions=False)
    make_clip(prune_tokenizer(clip_tokenizer(), ["the sky is blue"])).save(tmp_path / "clip")
    (tmp_path / "notes.txt").write_text("the sky is blue\nthe apple is red\nthe banana is yellow\n")
    (tmp_path / "questions.csv").write_text("question,answer,choices\nThe sky is,blue,red|blue\n")
    options = ["--clip", "clip", "--text", "notes.txt", "--questions", "questions.csv", "--steps", 2]
    assert run("pictures", "photos", "--model", decoder, "--out", "out", *options) == 0
    said = capsys.readouterr().out
    assert "photos: 6 pictures, 0 with 0 captions" in said and "valm serve out" in said
    assert "Your questions" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "questions" / "report.html").is_file()
