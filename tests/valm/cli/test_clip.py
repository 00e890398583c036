import json
import os
import shlex
import shutil
import signal
import time

import pytest
import torch
from PIL import Image

from tests.valm.cli.commands import THINGS, run, wrong_inputs
from tests.valm.tiny_clip import TINY
from valm.clip.clip import Clip
from valm.training import clip as clip_training
from valm.training.clip_run import CHECKPOINTS, SETTINGS_FILE
from valm.training.image_trainer import ImageTrainer
from valm_kernels.atomic_files import folder_lock


def test_a_clip_is_trained_and_checked(world, tmp_path, output_of):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    train = ["clip", "train", world / "pictures", "--steps", 3, "--batch-size", 6, "--lr", 3e-3]
    assert "6 images; loss" in output_of(*train, "--model", tmp_path / "tiny.json", "--out", tmp_path / "clip")
    checked = output_of("clip", "check", world / "pictures", "--clip", tmp_path / "clip")
    assert "text to image  recall@1" in checked


def test_a_text_side_is_trained_beside_a_frozen_image_side(world, tmp_path):
    """The result builds a knowledge base."""
    train = ["clip", "train", world / "pictures", "--steps", 3, "--batch-size", 6, "--image-tower", world / "clip"]
    assert run(*train, "--out", tmp_path / "lit") == 0
    assert run("kb", "build", world / "pictures", "--clip", tmp_path / "lit", "--out", tmp_path / "kb") == 0
    assert run(*train, "--cache-images", "--out", tmp_path / "cached") == 0
    assert Clip.load(tmp_path / "cached").encode_images(torch.zeros(1, 3, 32, 32)).shape == (1, TINY["embed_dim"])


def small_training(world):
    return ["clip", "train", world / "pictures", "--model", "small", "--steps", 5, "--batch-size", 4]


def test_a_training_without_a_checkpoint_binds_nobody(world, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    train = [*small_training(world), "--out", tmp_path / "clip"]
    with monkeypatch.context() as patch:
        patch.setattr("valm.training.clip_run.train_clip", interrupted)
        assert run(*train) == 130
    assert "interrupted" in capsys.readouterr().err
    assert run(*train, "--lr", 1e-2) == 0


def killed(train, out, monkeypatch, step, end):
    """Runs a training that `end` ends after the checkpoint of `step`."""
    save = ImageTrainer._save_checkpoint

    def save_and_end(training, *arguments):
        save(training, *arguments)
        if training.state.global_step == step:
            end()

    with monkeypatch.context() as patch:
        patch.setattr(ImageTrainer, "_save_checkpoint", save_and_end)
        assert run(*train, "--out", out) == 130


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def killed_training(world, tmp_path, monkeypatch):
    """Runs a training that is killed after its second checkpoint, in {tmp}/small, and returns the command."""
    killed(small_training(world), tmp_path / "small", monkeypatch, 2, interrupt)
    return small_training(world)


def test_a_killed_training_resumes(killed_training, tmp_path, output_of, caplog):
    out = output_of(*killed_training, "--out", tmp_path / "small")
    assert "contains the first 2 of 5 steps: resuming there" in caplog.text
    assert "6 images; loss" in out and "text to image among 6 images trained on: recall @1 " in out
    assert not (tmp_path / "small" / CHECKPOINTS).exists()
    assert run(*killed_training, "--out", tmp_path / "whole") == 0  # there is nothing to resume
    small, whole = (Clip.load(tmp_path / name) for name in ("small", "whole"))
    assert small.weights_hash == whole.weights_hash
    assert len(small.tokenizer) < 1000


def test_a_training_that_is_killed_at_its_end_is_finished_by_the_same_command(world, tmp_path, monkeypatch):
    train, out = small_training(world), tmp_path / "clip"
    with monkeypatch.context() as patch:
        patch.setattr("valm.training.clip_run.remove_folder", lambda folder: interrupt())
        assert run(*train, "--out", out) == 130
    trained = Clip.load(out).weights_hash
    assert run(*train, "--out", out) == 0
    assert Clip.load(out).weights_hash == trained and not (out / CHECKPOINTS).exists()


def test_one_process_at_a_time_trains_in_a_folder(killed_training, tmp_path, monkeypatch, error_of):
    """Otherwise another training would resume this one's checkpoints, or write its own settings beside them."""
    monkeypatch.setattr("valm.training.clip_run.WAIT_SECONDS", 0.0)
    out = tmp_path / "small"
    noted = (out / "training.json").read_bytes()
    with folder_lock(out / CHECKPOINTS, 0):
        assert "another process is writing there" in error_of(*killed_training, "--seed", 1, "--out", out)
    assert (out / "training.json").read_bytes() == noted


@pytest.mark.usefixtures("in_front")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint(world, tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr(clip_training, "SAVES", 1)
    train, step = small_training(world), ImageTrainer.training_step

    def signalled(training, *arguments, **options):
        if training.state.global_step == 2:
            os.kill(os.getpid(), number)
        return step(training, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ImageTrainer, "training_step", signalled)
        assert run(*train, "--out", tmp_path / "clip") == 130
    assert (tmp_path / "clip" / CHECKPOINTS / "checkpoint-3").is_dir()
    assert run(*train, "--out", tmp_path / "clip") == 0
    assert "contains the first 3 of 5 steps: resuming there" in caplog.text


def test_a_finished_training_is_complete(world, tmp_path, output_of, error_of):
    train = [*small_training(world), "--out", tmp_path / "clip"]
    assert run(*train) == 0
    trained = Clip.load(tmp_path / "clip").weights_hash
    assert output_of(*train) == f"{tmp_path / 'clip'} is complete; nothing to do\n"
    assert Clip.load(tmp_path / "clip").weights_hash == trained
    assert "contains another training: its --seed is 0, here it is 1; choose" in error_of(*train, "--seed", 1)


def test_a_picture_that_was_written_since_is_named(killed_training, world, tmp_path):
    later = time.time() + 5
    os.utime(tmp_path / "small" / SETTINGS_FILE, (later - 10, later - 10))
    picture = sorted((world / "pictures").glob("*.png"))[0]
    os.utime(picture, (later - 7, later - 7))
    with pytest.warns(UserWarning, match=rf"{picture.name} has been written since the training .* again in another"):
        assert run(*killed_training, "--out", tmp_path / "small") == 0


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--lr 1e-2", "--lr is 0.001, here it is 0.01"),
        pytest.param("--vocabulary {world}/corpus.txt", "--vocabulary is ", marks=pytest.mark.slow),
    ],
)
def test_another_training_does_not_continue_a_killed_one(killed_training, sentence, option, said):
    training = shlex.join(map(str, killed_training))
    sentence(f"{training} --out {{tmp}}/small {option}", f"contains another training: its {said}")


def test_the_words_of_another_text_are_tokens_too(world, tmp_path):
    train = ["clip", "train", world / "pictures", "--model", "small", "--steps", 1]
    assert run(*train, "--vocabulary", world / "corpus.txt", "--out", tmp_path / "more") == 0
    assert len(Clip.load(tmp_path / "more").tokenizer("the color of the sea")["input_ids"]) == 6


ABSENT = "at most half of the 2 images that its training held out are here: evaluated on all 6 images"


def test_images_are_held_out(world, tmp_path, output_of):
    train = ["clip", "train", world / "pictures", "--model", "small", "--steps", 1]
    out = output_of(*train, "--held-out", 0.34, "--out", tmp_path / "clip")
    assert "4 images; loss" in out and "among 4 images trained on" in out and "among 2 images held out" in out
    assert "on the held-out images if PICTURES contains them" in out
    shutil.copytree(world / "pictures", tmp_path / "others")
    for name in THINGS:  # other images of the same names
        Image.new("RGB", (9, 9)).save(tmp_path / "others" / f"{name}.png")
    seen = "evaluated on the 2 images that its training held out, of 6"
    for folder, said in ((world / "pictures", seen), (tmp_path / "others", ABSENT)):
        out = output_of("clip", "check", folder, "--clip", tmp_path / "clip")
        assert said in out and out.count("held out") == 1


OUT = "--out {tmp}/clip "
TRAIN = "clip train {world}/pictures " + OUT
NEW, SMALL = TRAIN + "--model ViT-B-32 ", TRAIN + "--model small "


@wrong_inputs(
    {
        TRAIN: "give --model, --image-tower, or both",
        TRAIN + "--model ViT-Z": "there is no CLIP architecture ViT-Z",
        TRAIN + "--model smal": "or a JSON file, did you mean small?",
        TRAIN + "--model {tmp}/none.json": "none.json",
        TRAIN + "--image-tower {tmp}/none": "no CLIP at",
        NEW + "--cache-images": "--cache-images needs a frozen image tower",
        NEW + "--vocabulary {world}/corpus.txt": "--vocabulary is for --model small",
        NEW + "--out {world}/clip": "is not empty",
        SMALL + "--held-out 0.1": "--held-out 0.1 of 6 images is 1",
        SMALL + "--held-out 0.01": "--held-out 0.01 of 6 images is 0",
        SMALL + "--held-out 1": "--held-out is 1.0, expected at least 0 and below 1",
        "clip train {tmp}/none --model ViT-B-32 " + OUT: "{tmp}/none",
    }
)
def test_wrong_input_is_one_sentence(sentence, command, message):
    sentence(command, message)


@pytest.mark.parametrize("option", ["--lr -1", "--lr nan", "--held-out -1", "--max-logit-scale 0"])
def test_numbers_out_of_range_are_refused(option, sentence):
    sentence(NEW + option, f"{option.split()[0]} is ")
