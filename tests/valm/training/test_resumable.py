import json
import shutil

import pytest

from tests.valm.training.documents import new_trainer
from valm.errors import ValmError
from valm.training.resumable import CHECKSUMS_FILE, STATE_FILE, check_resumable, write_checksums


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    new_trainer(folder, max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy") / "checkpoint-1"


def note_again(checkpoint):
    """The checksums of what the files are now."""
    (checkpoint / CHECKSUMS_FILE).unlink()
    write_checksums(checkpoint)


def resume(checkpoint):
    new_trainer(checkpoint.parent, max_steps=2).train(resume_from_checkpoint=True)


def test_every_file_of_a_checkpoint_has_a_checksum(checkpoint):
    noted = json.loads((checkpoint / CHECKSUMS_FILE).read_text())
    assert {CHECKSUMS_FILE, *noted} == {file.name for file in checkpoint.iterdir()}
    check_resumable(checkpoint)
    (checkpoint / "notes.txt").write_text("of the user's own")
    resume(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "model.safetensors", STATE_FILE])
def test_a_damaged_file_is_named(checkpoint, name):
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
    with pytest.raises(ValmError, match=rf"is damaged \({name}\); resume from an earlier checkpoint"):
        resume(checkpoint)
    (checkpoint / name).unlink()
    with pytest.raises(ValmError, match=rf"is damaged \({name}\)"):
        resume(checkpoint)


def test_a_model_alone_is_no_checkpoint_to_resume_from(tmp_path):
    new_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True).train()
    with pytest.raises(ValmError, match=r"checkpoint-1 has a model without its optimizer .* as save_only_model makes"):
        resume(tmp_path / "checkpoint-1")


def test_a_checkpoint_without_checksums_is_refused(checkpoint):
    (checkpoint / CHECKSUMS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-1/checksums\.json"):
        check_resumable(checkpoint)


def test_links_out_are_not_opened(checkpoint):
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "optimizer.pt").symlink_to("/etc/hostname")
    with pytest.raises(PermissionError, match="is a link that leads out of its folder"):
        resume(checkpoint)


def test_a_checkpoint_that_links_out_is_not_resumed_from(checkpoint, tmp_path):
    elsewhere = checkpoint.rename(tmp_path / "elsewhere")
    checkpoint.symlink_to(elsewhere)
    with pytest.raises(PermissionError, match=r"is a link that leads out of its folder.*checkpoint-1"):
        resume(checkpoint)
    checkpoint.unlink()
    elsewhere.rename(checkpoint)
    (checkpoint / "optimizer").symlink_to(tmp_path)
    with pytest.raises(PermissionError, match=r"is a link that leads out of its folder.*optimizer"):
        resume(checkpoint)


@pytest.mark.parametrize("kept", [set(), {STATE_FILE}])
def test_a_file_without_a_checksum_is_not_read(checkpoint, kept):
    noted = json.loads((checkpoint / CHECKSUMS_FILE).read_text())
    (checkpoint / CHECKSUMS_FILE).write_text(json.dumps({name: noted[name] for name in kept}))
    with pytest.raises(
        ValmError, match=rf"has no checksum of config\.json in {CHECKSUMS_FILE}; resume from an earlier"
    ):
        resume(checkpoint)


@pytest.mark.parametrize("name", ["total_flos", "num_input_tokens_seen", "train_batch_size", "stateful_callbacks"])
def test_a_state_that_the_trainer_could_not_use_is_one_sentence(checkpoint, name):
    """It would fail long after the training went on: when the next checkpoint is written."""
    state = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(json.dumps(state | {name: "x"}))
    note_again(checkpoint)
    with pytest.raises(ValmError, match=rf"{STATE_FILE} is damaged: {name}: .*got 'x'"):
        check_resumable(checkpoint)


def test_a_state_with_a_name_that_the_trainer_does_not_know_is_one_sentence(checkpoint):
    state = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(json.dumps(state | {"is_local_processzzero": True}))
    note_again(checkpoint)
    with pytest.raises(ValmError, match=r"cannot resume from .*is_local_processzzero"):
        check_resumable(checkpoint)


@pytest.mark.parametrize("best", ["..", "/", "checkpoint-1/../.."])
def test_the_best_checkpoint_is_in_the_folder(checkpoint, best):
    state = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(json.dumps(state | {"best_model_checkpoint": best}))
    note_again(checkpoint)
    with pytest.raises(ValmError, match=r"best_model_checkpoint: String should match"):
        resume(checkpoint)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ValmError, match="holds no checkpoint to resume from"):
        new_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValmError, match="there is no checkpoint"):
        new_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_the_best_checkpoint_is_one_of_this_training(checkpoint):
    """The note may name another folder: where the training was before it was copied."""
    made = new_trainer(checkpoint.parent, max_steps=1)
    made.state.best_model_checkpoint = f"/elsewhere/{checkpoint.name}"
    made._load_best_model()
    assert made.state.best_model_checkpoint == str(checkpoint)
