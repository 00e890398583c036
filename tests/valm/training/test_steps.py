from itertools import islice

import pytest
import torch

from valm.training.steps import Draws, take_steps


@pytest.mark.parametrize("steps", [1, 2, 10, 25])
def test_any_number_of_steps(steps):
    weight = torch.nn.Parameter(torch.ones(3))

    def losses():
        while True:
            yield weight.square().sum()

    found = take_steps([weight], losses(), steps=steps, lr=0.1, weight_decay=0.0, progress=None)
    assert len(found) == steps and found[0] == 3.0
    assert weight.square().sum() < 3.0


def test_skipped_batches_leave_the_others_as_they_are():
    whole = list(islice(Draws(10, 3, seed=1), 12))
    assert list(islice(Draws(10, 3, seed=1, skip=7), 5)) == whole[7:]
