"""`valm train` as several processes, by the launchers that docs/how-to/training.md names."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tolerance import assert_agree
from tests.valm.cli.commands import STEPS, run


def launch(folder, command, *more):
    """Runs a command line in `folder`, with the programs beside this Python."""
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = f"{command} {' '.join(map(str, more))}"
    return subprocess.run(script, shell=True, cwd=folder, env=os.environ | path, capture_output=True, text=True)


def losses(folder):
    """Of every step of the training in `folder`."""
    history = json.loads((folder / f"checkpoint-{STEPS[1]}" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def documented(world, base, tmp_path_factory):
    """The folder in which the commands of docs/how-to/training.md run, and the losses of one process."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "kb").symlink_to(world / "kb")
    (folder / "retrieval").symlink_to(world / "base-retrieval")
    lines = [f"base: {base}", "logit_bias: -1", "steps: 3", "batch_size: 2", "logging_steps: 1"]
    (folder / "run.yaml").write_text("\n".join(lines))
    options = ["--retrieval", world / "base-retrieval", "--kb", world / "kb", "--config", folder / "run.yaml"]
    assert run("train", *options, "--batch-size", 4, "--out", folder / "one") == 0
    return folder, losses(folder / "one")


PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "training.md"
COMMANDS = re.findall(r"^(?:torchrun|accelerate launch) .*$", PAGE.read_text(), re.M)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("more", ["", "--ddp_backend gloo"])
def test_the_documented_launches_train_one_model(documented, command, more, tmp_path):
    """Without CUDA too, and with the losses of one process."""
    folder, expected = documented
    for name in ("kb", "retrieval", "run.yaml"):
        (tmp_path / name).symlink_to(folder / name)
    done = launch(tmp_path, command, more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert json.loads((tmp_path / "model" / "_run.json").read_text())["step_rows"] == 4
    assert_agree(losses(tmp_path / "model"), expected)


@pytest.mark.slow
def test_all_processes_measure_the_base_as_one_does(documented, world, tmp_path):
    folder, _ = documented
    fields = ["--validation", 0.3, "--logit-bias", 0, "--limit-softmax"]
    done = launch(folder, COMMANDS[0], *fields, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of the base, which is the model without images") == 1
    options = ["--retrieval", world / "base-retrieval", "--kb", world / "kb", "--config", folder / "run.yaml"]
    assert run("train", *options, "--batch-size", 4, *fields, "--out", tmp_path / "one") == 0
    one, two = (json.loads((tmp_path / name / "_run.json").read_text())["numbers"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (f"{COMMANDS[0]} --use_cpu False --ddp_backend gloo", "2 processes were launched, but each would train by its"),
        (
            "accelerate launch --cpu --num_processes 2 -m valm train --retrieval retrieval --kb kb --config run.yaml",
            "accelerate launch has started one process of several",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without CUDA")
def test_a_launch_that_would_train_several_models_writes_nothing(documented, command, sentence, tmp_path):
    folder, _ = documented
    done = launch(folder, command, "--out", tmp_path / "model")
    assert done.returncode != 0 and f"valm: error: {sentence}" in done.stderr
    assert not list(tmp_path.iterdir())
