"""Trainings of two processes on one machine, over gloo, against one process with the same batches."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.tolerance import assert_agree
from tests.valm.training.documents import new_trainer
from tests.valm.training.process import STEPS, train, unequal_documents
from valm.model.checkpoint import load

pytestmark = pytest.mark.slow


def launch(*module):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *module]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]


def run(folder, **fields):
    """What each of two processes found."""
    folder.mkdir(exist_ok=True)
    launch("tests.valm.training.process", folder, json.dumps(fields))
    return [json.loads((folder / f"process-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with four documents a step."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder, {"per_device_train_batch_size": 4})
    return json.loads((folder / "process-0.json").read_text())


@pytest.mark.parametrize("fields", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}])
def test_two_processes_train_as_one_does(tmp_path, alone, fields):
    two = run(tmp_path / "two", **({"per_device_train_batch_size": 2} | fields))
    assert [one["processes"] for one in two] == [2, 2] and alone["processes"] == 1
    assert all(len(one["losses"]) == STEPS for one in (*two, alone))
    assert_agree(two[0]["losses"], alone["losses"])
    assert_agree([one["eval_loss"] for one in two], alone["eval_loss"])
    # the rows of each step are those of one process, each read by one of the two
    rows = np.concatenate([np.reshape(one["read"][: STEPS * 2], (STEPS, 2)) for one in two], axis=1)
    assert np.array_equal(np.sort(rows), np.sort(np.reshape(alone["read"][: STEPS * 4], (STEPS, 4))))
    assert sorted(rows.reshape(-1)[:20].tolist()) == sorted({*rows.reshape(-1)[:20].tolist()})
    model, _ = load(tmp_path / "two" / "model")
    check = new_trainer(tmp_path, model=model, eval_dataset=unequal_documents(7, seed=1))
    assert_agree(check.evaluate()["eval_loss"], alone["eval_loss"])


def test_two_processes_go_on_as_if_they_had_not_stopped(tmp_path, alone):
    fields = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 20}
    run(tmp_path / "two", **fields)
    assert sorted(path.name for path in (tmp_path / "two").glob("*-*0")) == [f"checkpoint-{n}" for n in (20, 40, 50)]
    for name in ("checkpoint-40", "checkpoint-50"):
        shutil.rmtree(tmp_path / "two" / name)
    for one in run(tmp_path / "two", resume_from_checkpoint=True, **fields):
        assert_agree(one["losses"], alone["losses"])


def test_a_sharded_model_has_the_gradients_of_a_whole_one_where_one_process_has_no_image():
    """accelerate shards on accelerators alone; this is what it shards with."""
    launch("tests.valm.training.sharded")
