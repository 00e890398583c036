"""A term of the training loss that keeps a model with images near its frozen base.

Images that raise the probability of a colour word also teach the fusion the style of the text around it, and then make
other text less likely (studies/color/plan.md measures it). The Kullback-Leibler divergence from the base allows a
change only where the text gains more by it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from valm.errors import ValmError
from valm.model.probe import in_mode, probe_tokens
from valm.training.cache_below import no_images
from valm.training.collate import IGNORED
from valm.training.image_trainer import FUSION_NAME, without_images
from valm.training.next_token_loss import check_own_loss


def stay_near_base(training: Trainer, model: Any, weight: float) -> None:
    """The method base_kl: adds `weight` × the divergence from the frozen base to the training loss."""
    check_own_loss(training, "base_kl", "set base_kl (--base-kl) to 0")
    BaseDivergence(model, weight)


class BaseDivergence:
    """Adds `weight` × KL(base ‖ model) to the loss of `model`, in training mode.

    The divergence is summed over the predicted tokens and divided as the cross entropy is, by num_items_in_batch if
    given, else by their number. The base's distribution is that of the model without images and without dropout; a
    second pass without gradients computes it, from the fusion layer up if `cache_below` is used. The model is changed;
    its weights and their names stay the same.

    Args:
        model: what `valm.augment` returned, its base frozen.

    Raises:
        ValmError: a weight of the base trains, so the model without images is not the base; or the model does not
            compute its loss by its `loss_function`.
    """

    def __init__(self, model: Any, weight: float):
        trained = [name for name, one in model.named_parameters() if one.requires_grad and FUSION_NAME not in name]
        if trained:
            raise ValmError(
                f"base_kl compares the model with its frozen base, but {trained[0]} trains: freeze it, or set base_kl "
                "to 0"
            )
        self._model, self._weight = model, weight
        self._call: dict[str, Any] = {}  # the arguments of the running call
        self._base: Tensor | None = None  # (B, T, V) logits of the base, during its pass
        self._reads_base = self._works = False
        self._loss_of_model = model.loss_function
        model.loss_function = self._loss
        model.register_forward_pre_hook(self._note, with_kwargs=True, prepend=True)  # before the input is cached
        ids = probe_tokens(model)
        with torch.enable_grad(), in_mode(model, training=True), torch.random.fork_rng():
            model(input_ids=ids, labels=ids, **no_images(model, ids))
        if not self._works:
            raise ValmError(f"the loss of {type(model).__name__} cannot be changed: set base_kl to 0")

    def _note(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if model.training and not self._reads_base:
            self._call = kwargs

    def _loss(
        self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **more: Any
    ) -> Tensor:
        """logits: (B, T, V). labels: (B, T), which may be other numbers of the tokens (`LimitedSoftmax`)."""
        if self._reads_base:
            self._base = logits
            return logits.new_zeros(())
        loss = self._loss_of_model(
            logits=logits, labels=labels, vocab_size=vocab_size, num_items_in_batch=num_items_in_batch, **more
        )
        if not (self._model.training and torch.is_grad_enabled()):
            return loss
        self._works = True
        predicted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(logits.device) != IGNORED
        found, base = (F.log_softmax(one[predicted].float(), dim=-1) for one in (logits, self._base_logits()))
        divergence = F.kl_div(found, base, reduction="sum", log_target=True)
        count = predicted.sum() if num_items_in_batch is None else num_items_in_batch
        return loss + self._weight * divergence / torch.as_tensor(count, device=loss.device)

    @torch.no_grad()
    def _base_logits(self) -> Tensor:
        """The base's logits (B, T, V) for the running call."""
        head = self._model.get_output_embeddings()
        self._reads_base = True
        try:
            with in_mode(self._model, training=False), torch.random.fork_rng():
                head.train()  # the mode in which `LimitedSoftmax` computes its part of the vocabulary
                self._model(**without_images(self._model, self._call) | {"use_cache": False})
        finally:
            self._reads_base = False
        assert self._base is not None
        base, self._base, self._call = self._base, None, {}
        return base
