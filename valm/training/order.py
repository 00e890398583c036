"""The order in which a training reads its data: the same for one seed and any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler


class TrainingOrder(Sampler[int]):
    """The numbers below `size` in one sequence for the whole training, reshuffled after each pass.

    Step i reads the rows [i · step_rows, (i + 1) · step_rows) of the sequence. So all batches are full, a step's rows
    depend only on the seed, `size` and `step_rows`, and no two processes read the same position. An epoch contains as
    many whole steps as fit, and the next epoch continues where it ended. The sequence ends with the last step.

    Args:
        size: rows of the data.
        step_rows: rows that all processes together read in a step.
        seed: seed of the order.
        step: returns the number of finished steps.
        max_steps: steps of the training, or -1 if the epochs determine them.
    """

    def __init__(self, size: int, step_rows: int, seed: int, step: Callable[[], int], max_steps: int = -1):
        self.size, self.step_rows, self.seed, self.step, self.max_steps = size, step_rows, seed, step, max_steps
        self.epoch_steps = max(1, size // step_rows)

    def __len__(self) -> int:
        return self.epoch_steps * self.step_rows

    def __iter__(self) -> Iterator[int]:
        first = self.step() // self.epoch_steps * self.epoch_steps
        last = first + self.epoch_steps
        if self.max_steps > 0:
            last = min(last, self.max_steps)
        return self.rows(first * self.step_rows, last * self.step_rows)

    def rows(self, start: int, stop: int) -> Iterator[int]:
        """The sequence from `start` to `stop`."""
        generator = np.random.default_rng(self.seed)
        begin = 0
        while begin < stop:
            shuffled = generator.permutation(self.size)
            yield from shuffled[max(0, start - begin) : max(0, stop - begin)].tolist()
            begin += self.size
