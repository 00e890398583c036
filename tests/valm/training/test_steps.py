import pytest
import torch

from valm.training.steps import take_steps


@pytest.mark.parametrize("steps", [1, 2, 10, 25])
def test_any_number_of_steps(steps):
    weight = torch.nn.Parameter(torch.ones(3))

    def losses():
        while True:
            yield weight.square().sum()

    found = take_steps([weight], losses(), steps=steps, lr=0.1, weight_decay=0.0, progress=None)
    assert len(found) == steps and found[0] == 3.0
    assert weight.square().sum() < 3.0
