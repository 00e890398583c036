"""`valm train`: a training that goes on, and what ends one."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.valm.cli.commands import SIZE, evaluations, run
from tests.valm.killed import exit_code, forked, needs_fork
from valm.training.image_trainer import ImageTrainer


def test_a_training_goes_on_from_its_newest_checkpoint(world, tmp_path, error_of):
    train = ["train", world / "corpus.txt", "--tokenizer", world / "clip", *SIZE, "--save_steps", 1]
    out = ["--out", tmp_path / "model"]
    assert run(*train, *out, "--resume") == 0  # nothing to resume yet
    expected = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "model" / "checkpoint-3")
    assert "is not empty: choose another, or give --resume" in error_of(*train, *out)
    assert run(*train, *out, "--resume", "--logging_steps", 1) == 0
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(written[name], weight) for name, weight in expected.items())
    for other, name in (
        (["--lr", 1], "--lr is 0.0005, here it is 1"),
        (["--model", "2x32x4"], "--model is '3x32x4', here it is '2x32x4'"),
        (["--batch-size", 2], "--batch-size of all processes together is 4, here it is 2"),
        (["--weight_decay", 1], "--weight_decay is not given, here it is 1"),
    ):
        assert f"contains another training: its {name}" in error_of(*train, *other, *out, "--resume")
    assert "contains no training to resume" in error_of(*train, "--out", world / "kb", "--resume")


def test_a_resumed_training_is_evaluated_on_the_same_text(world, tmp_path, error_of):
    """Whatever the name of its file."""
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("the sea is blue\nthe sun is red")
    train = ["train", world / "corpus.txt", "--tokenizer", world / "clip", *SIZE, "--out", tmp_path / "model"]
    assert run(*train, "--validation", held_out) == 0
    renamed = held_out.rename(tmp_path / "renamed.txt")
    assert run(*train, "--validation", renamed, "--steps", 4, "--resume") == 0
    renamed.write_text("the sea is green\nthe sun is red")
    for other in (renamed, 0.5):
        error = error_of(*train, "--validation", other, "--steps", 5, "--resume")
        assert "contains another training: its --validation is " in error


def test_a_resumed_training_takes_more_steps(world, tmp_path):
    """At a constant learning rate they are those of a training that was begun with them."""
    train = ["train", world / "corpus.txt", "--tokenizer", world / "clip", *SIZE, "--lr_scheduler_type", "constant"]
    assert run(*train, "--steps", 6, "--out", tmp_path / "begun") == 0
    assert run(*train, "--steps", 3, "--out", tmp_path / "more") == 0
    assert run(*train, "--steps", 6, "--out", tmp_path / "more", "--resume") == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("begun", "more")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    steps = train.index("--steps")
    epochs = [*train[:steps], *train[steps + 2 :], "--num_train_epochs", 8]
    assert run(*epochs, "--out", tmp_path / "more", "--resume") == 0
    state = json.loads((tmp_path / "more" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 8


def test_a_resumed_training_saves_and_evaluates_as_now_asked(world, tmp_path):
    train = ["train", "--retrieval", world / "retrieval", "--kb", world / "kb", *SIZE, "--out", tmp_path / "model"]
    train += ["--validation", 0.3, "--save_total_limit", 9]
    assert run(*train, "--save_steps", 2, "--patience", 9) == 0
    assert [entry["step"] for entry in evaluations(tmp_path / "model")] == [2, 3]
    assert run(*train, "--save_steps", 1, "--steps", 5, "--patience", 8, "--use_cpu", "--resume") == 0
    assert [entry["step"] for entry in evaluations(tmp_path / "model")] == [2, 3, 4, 5]
    kept = {path.name for path in (tmp_path / "model").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}" for step in (2, 3, 4, 5)}


def test_another_training_is_named_by_the_option_that_was_given(world, tmp_path, error_of):
    """Not by a field that follows from it."""
    train = ["train", world / "corpus.txt", "--tokenizer", world / "clip", *SIZE, "--out", tmp_path / "model"]
    assert run(*train) == 0
    said = "contains another training: its --validation is not given, here it is '0.3'"
    assert said in error_of(*train, "--validation", 0.3, "--resume")


@pytest.mark.slow
@needs_fork
def test_one_process_at_a_time_trains_in_a_folder(world, tmp_path, capfd, monkeypatch):
    """However they were started, such as by srun, which sets no WORLD_SIZE."""
    train = ["train", world / "corpus.txt", "--tokenizer", world / "clip", *SIZE, "--out", tmp_path / "model"]
    monkeypatch.setattr("valm.training.run_note.WAIT_SECONDS", 0)
    statuses = []

    def start_another(self, *arguments, real=ImageTrainer.train, **options):
        monkeypatch.setattr(ImageTrainer, "train", real)
        for more in ([], ["--resume"]):
            statuses.append(exit_code(forked(lambda more=more: sys.exit(run(*train, "--lr", 1, *more)))))
        return real(self, *arguments, **options)

    monkeypatch.setattr(ImageTrainer, "train", start_another)
    assert run(*train) == 0 and statuses == [1, 1]
    assert capfd.readouterr().err.count(f"{tmp_path / 'model' / '_run.json'}: another process is writing there") == 2
    assert run(*train, "--resume") == 0  # it has ended


@pytest.mark.parametrize(
    ("wrong", "again"),
    [(["--lr", "1e30"], []), (["--lr", "1e30"], ["--resume"])],
    ids=["no step", "no checkpoint"],
)
def test_a_training_without_a_checkpoint_binds_nobody(world, tmp_path, error_of, wrong, again):
    """It has nothing that another one could go on from, or lose."""
    train = ["train", world / "corpus.txt", "--tokenizer", world / "clip", *SIZE, "--out", tmp_path / "model"]
    (tmp_path / "model" / "runs").mkdir(parents=True)  # of TensorBoard
    assert run(*train[:-2], *wrong, "--lr_scheduler_type", "constant", "--out", tmp_path / "other") == 1
    (tmp_path / "other" / "_run.json").rename(tmp_path / "model" / "_run.json")
    assert run(*train, *again) == 0
    expected = load_file(world / "gpt2" / "model.safetensors")
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(written[name], weight) for name, weight in expected.items())
    assert ("its --lr is 0.0005, here it is 1" if again else "is not empty") in error_of(*train, "--lr", 1, *again)


def test_a_training_with_images_does_not_resume_without(world, tmp_path, error_of):
    """The Trainer would leave the weights that see images out with no more than a warning."""
    train = ["train", "--retrieval", world / "retrieval", *SIZE, "--out", tmp_path / "model"]
    assert run(*train, "--kb", world / "kb") == 0
    assert "its --kb is 'given', here it is not given" in error_of(*train, "--resume")
