"""The next-token loss with smoothed labels, and a test whether a model computes the next-token loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from valm.errors import ValmError
from valm.model.probe import in_mode, probe_tokens
from valm.training.cache_below import no_images
from valm.training.collate import IGNORED


class NextTokenLoss:
    """The cross entropy of each token with the preceding logits; a `compute_loss_func` of transformers' Trainer.

    Args:
        smoothing: share of the target that is spread evenly over the vocabulary (Szegedy et al. 2016), except in
            evaluation, which is without gradients.
    """

    def __init__(self, smoothing: float = 0.0):
        self.smoothing = smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The sum over the tokens, divided by num_items_in_batch if given, else by their number.

        Args:
            outputs: of the model, with logits (B, T, V).
            labels: (B, T) int64; IGNORED is not counted.
        """
        logits = (outputs["logits"] if isinstance(outputs, dict) else outputs[0])[:, :-1].float()
        following = labels[:, 1:].to(logits.device)
        total = F.cross_entropy(
            logits.flatten(0, 1),
            following.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.smoothing if torch.is_grad_enabled() else 0.0,
        )
        count = following.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)


@torch.no_grad()
def has_next_token_loss(model: Any) -> bool:
    """Whether `model` returns the loss of next tokens, divided by num_items_in_batch.

    transformers' BART and its kin compare each token with its own logits and return a mean over the batch.
    """
    ids = probe_tokens(model)
    first_unseen = ids.clone()
    first_unseen[:, 0] = IGNORED  # nothing predicts it

    def loss(labels: Tensor, count: int) -> Tensor:
        number = torch.tensor(count, device=ids.device)
        return model(input_ids=ids, labels=labels, num_items_in_batch=number, **no_images(model, ids)).loss

    with in_mode(model, training=False), torch.random.fork_rng():
        try:
            whole, others, halved = loss(ids, 1), loss(first_unseen, 1), loss(ids, 2)
        except TypeError:  # it takes no num_items_in_batch
            return False
    return bool(torch.isclose(whole, others, rtol=1e-4) and halved < 0.9 * whole)


def check_own_loss(training: Trainer, method: str, remedy: str) -> None:
    """Raises ValmError if the loss of the model, which `method` changes, is replaced in `training`."""
    if training.compute_loss_func is not None:
        raise ValmError(
            f"{method} changes the model's own loss, which label_smoothing_factor or compute_loss_func replaces: leave "
            f"these out, or {remedy}"
        )
