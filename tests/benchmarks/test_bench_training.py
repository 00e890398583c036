from functools import partial

import pytest
import torch

from benchmarks.valm import bench_training
from valm.model.config import ValmConfig


@pytest.mark.parametrize(
    ("num_images", "min_score"),
    [pytest.param(0, None, marks=pytest.mark.slow), pytest.param(4, None, marks=pytest.mark.slow), (4, 0.5)],
)
def test_a_step_of_a_small_model_trains_it(monkeypatch, num_images, min_score):
    monkeypatch.setattr(bench_training, "ValmConfig", partial(ValmConfig, n_layer=2, n_embd=32, n_head=2))
    monkeypatch.setattr(bench_training, "STORED", 5000)
    monkeypatch.setattr(bench_training, "TOKENS", 128)
    step, weights = bench_training.training_step(num_images, torch.device("cpu"), min_score)
    losses = [step().item() for _ in range(4)]
    assert weights > 1e6 and losses[-1] < losses[0] < 12
