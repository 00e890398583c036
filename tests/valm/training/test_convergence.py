"""Long trainings: the fused operation against the reference, and runs that are killed again and again."""

import functools
import random
import signal
import time

import numpy as np
import pytest
import torch

from tests.valm.killed import SECONDS, forked, needs_fork
from tests.valm.training.documents import TOKENIZER, documents, new_model, new_trainer
from valm.model import attention
from valm.model.checkpoint import load
from valm_kernels import visual_fusion_attn
from valm_kernels.atomic_files import is_temporary

pytestmark = pytest.mark.slow


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_fused_operation_has_the_losses_of_the_reference(tmp_path, monkeypatch, threads):
    """Over 200 steps, as far apart as twice what another thread count does to the reference."""

    def losses(impl, count):
        monkeypatch.setattr(attention, "visual_fusion_attn", functools.partial(visual_fusion_attn, impl=impl))
        threads(count)
        model = new_model(n_embd=128, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        sizes = {"max_steps": 200, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 20}
        made = new_trainer(tmp_path, model=model, dataset=documents(count=64), **sizes)
        made.train()
        return np.array(made.losses())

    reference = losses("reference", 1)
    rounding = np.abs(losses("reference", 2) - reference).max()
    assert rounding > 0 and reference[-1] < 0.6 * reference[0]
    assert np.abs(losses("cpu", 1) - reference).max() <= 2 * rounding


@needs_fork
def test_twenty_kills_change_nothing(tmp_path):
    """At random moments of a training that checkpoints every second step; each run goes on where the last was."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 60, "save_total_limit": 2}

    def train(folder):
        done = any(not is_temporary(path.name) for path in folder.iterdir())
        made = new_trainer(folder, **settings)
        made.train(resume_from_checkpoint=done)
        made.write(folder / "model", TOKENIZER)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    begin = time.monotonic()
    train(whole)
    seconds = time.monotonic() - begin
    generator, kills = random.Random(0), 0
    while kills < 20:
        child = forked(lambda: train(killed))
        child.join(generator.uniform(0.02, 0.12) * seconds)
        child.kill()
        child.join(SECONDS)
        assert child.exitcode in (0, -signal.SIGKILL)
        kills += child.exitcode != 0
    train(killed)
    models = [load(folder / "model")[0].state_dict() for folder in (whole, killed)]
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())
