"""A long training: the fused operation against the reference."""

import functools

import numpy as np
import pytest

from tests.threads import torch_threads
from tests.valm.training.documents import documents, new_model, new_trainer
from valm.model import attention
from valm_kernels import visual_fusion_attn


@pytest.mark.slow
def test_the_fused_operation_has_the_losses_of_the_reference(tmp_path, monkeypatch):
    """Over 200 steps, as far apart as twice what another thread count does to the reference."""

    def losses(impl, count):
        monkeypatch.setattr(attention, "visual_fusion_attn", functools.partial(visual_fusion_attn, impl=impl))
        model = new_model(n_embd=128, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        sizes = {"max_steps": 200, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 20}
        made = new_trainer(tmp_path, model=model, dataset=documents(count=64), **sizes)
        with torch_threads(count):
            made.train()
        return np.array(made.losses())

    reference = losses("reference", 1)
    rounding = np.abs(losses("reference", 2) - reference).max()
    assert rounding > 0 and reference[-1] < 0.6 * reference[0]
    assert np.abs(losses("cpu", 1) - reference).max() <= 2 * rounding
