"""The steps of the training of a CLIP, which needs no Trainer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from valm.errors import ValmError
from valm.progress import progress_bar
from valm.training.steps_checkpoint import StepsCheckpoint


def take_steps(
    parameters: Iterable[nn.Parameter],
    losses: Iterable[Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    progress: str | None,
    checkpoint: StepsCheckpoint | None = None,
) -> list[float]:
    """Trains `parameters` in place, and returns the loss of every step.

    AdamW, a learning rate that rises for a tenth of the steps and falls as a cosine (one cycle), gradients clipped
    at 1.

    Args:
        losses: at least `steps` losses, each computed when it is asked for: with the parameters as they are then. With
            a checkpoint, those after `checkpoint.losses`.
        progress: name of the progress bar; None shows none.
        checkpoint: continue from it, and write it on the way.

    Raises:
        OSError, ValmError: the checkpoint cannot be written.
        ValmError: a loss is not finite, or the checkpoint is of another model.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    # at 0.1 x 10 steps OneCycleLR would divide by 0
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.11 if steps == 10 else 0.1)
    found = [] if checkpoint is None else checkpoint.restore(optimizer, schedule)
    done, shown = len(found), progress is not None
    with progress_bar(total=steps, initial=done, desc=progress, unit="step", shown=shown) as bar:
        for step, loss in zip(range(done, steps), losses, strict=False):
            found.append(loss.item())
            if not math.isfinite(found[-1]):
                raise ValmError(f"the loss of step {step + 1} is {found[-1]}: try a smaller learning rate than {lr}")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{found[-1]:.3f}", refresh=False)
            bar.update()
            if checkpoint is not None:
                checkpoint.save_if_due(optimizer, found)
    return found


class Draws:
    """Batches of (number of the draw, index of the example), without end.

    All examples come once before any comes again, except for a remainder smaller than a batch.

    Args:
        skip: batches skipped at the beginning, which a resumed training has had.
    """

    def __init__(self, examples: int, size: int, seed: int, skip: int = 0):
        self.examples, self.size, self.seed, self.skip = examples, size, seed, skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._all(), self.skip, None)

    def _all(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed)
        number = 0
        while True:
            order = torch.randperm(self.examples, generator=generator).tolist()
            for start in range(0, self.examples - self.size + 1, self.size):
                yield [(number + row, order[start + row]) for row in range(self.size)]
                number += self.size
