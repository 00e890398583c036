"""A training loss in which the tokens that see images count more.

A corpus names few of the things that its images show. So the loss is mostly over tokens that need no image, and the
fusion layer learns slowly to read images (docs/results/study.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from valm.training.collate import IGNORED


class ImageWeight:
    """Multiplies the loss of `model`, in training mode, by `weight` at each token that sees an image.

    The loss of a token is the cross entropy of the next token. The sum of the products is divided by the number of
    tokens, as it is without weights, so the loss of a step does not depend on how its documents are divided among
    batches and processes. The model is changed; its weights and their names stay the same.

    Args:
        model: a causal language model with images whose loss is that of the next token
            (`valm.training.next_token_loss.has_next_token_loss`).
    """

    def __init__(self, model: Any, weight: float):
        self._weight = weight
        self._sees: Tensor | None = None  # (B, T) of the last call: whether a token sees an image
        self._loss_of_model = model.loss_function
        model.loss_function = self._loss
        decoder = model.get_decoder() if model.base_model is model else model.base_model
        decoder.register_forward_pre_hook(self._note, with_kwargs=True)  # after the hook that finds the images

    def _note(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        index = kwargs.get("image_index")
        self._sees = (index >= 0).any(-1) if index is not None and decoder.training else None

    def _loss(
        self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **more: Any
    ) -> Tensor:
        """logits: (B, T, V). labels: (B, T)."""
        if self._sees is None:
            given = {"num_items_in_batch": num_items_in_batch, **more}
            return self._loss_of_model(logits=logits, labels=labels, vocab_size=vocab_size, **given)
        following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(logits.device).flatten()
        losses = F.cross_entropy(logits.flatten(0, 1).float(), following, ignore_index=IGNORED, reduction="none")
        sees = self._sees.to(logits.device).flatten()
        count = (following != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return torch.where(sees, self._weight * losses, losses).sum() / count
