"""Mixes the trained weights of a pretrained decoder with those that it began with: in a given share, or as much as
held-out text asks for (WiSE-FT, Wortsman et al. 2022).

A layer that trains on little text forgets how other text goes on; a share of its first weights gives some of that back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from valm.training.cache_below import no_images
from valm.training.image_trainer import FUSION_NAME, ImageTrainer

# Shares of the base to choose from.
SHARES = (0.0, 0.125, 0.25, 0.375, 0.5)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of the parameters that train and that the base has too, by name."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in _trained(model)}


def mix(training: ImageTrainer, base: Mapping[str, Tensor], share: float | None = None) -> dict[str, float]:
    """Makes each trained weight (1 - share) × itself + share × the base's.

    The new parameters stay as they are. All processes call it, and choose the same.

    Args:
        training: after its `train()`, with documents to evaluate on; with a share, these may be missing.
        base: the `base_weights` of its model before that.
        share: default: that of SHARES with the least held-out loss, the first of equally good ones.

    Returns:
        For the model card: `base_share`, if anything can be mixed; and of the held-out documents `eval_loss` and
        `eval_perplexity` of the mixed model, and the perplexities of the base, of the trained model and, if it sees
        images, of the mixed model without them.
    """
    model: Any = training.model
    trained = base_weights(model)
    if training.eval_dataset is None:
        assert share is not None
        _set(model, trained, base, share)
        return {"base_share": share}

    def loss(share: float) -> float:
        _set(model, trained, base, share)
        return training.held_out_loss()

    with _without_images(model):
        of_base = loss(1.0)  # the new parameters have no part in it
    losses = {share: loss(share) for share in _shares(base, share)}
    chosen = min(losses, key=lambda share: losses[share]) if share is None else share
    with _without_images(model):
        without_images = loss(chosen)  # and the model stays so
    perplexities = {
        "eval_perplexity": losses[chosen],
        "eval_perplexity_base": of_base,
        "eval_perplexity_trained": losses[0.0],
    }
    if model.fusion_options.num_images > 0:
        perplexities["eval_perplexity_without_images"] = without_images
    found = {"base_share": chosen} if base else {}
    found["eval_loss"] = losses[chosen]
    return found | {name: math.exp(min(value, 700)) for name, value in perplexities.items()}


def _shares(base: Mapping[str, Tensor], share: float | None) -> Sequence[float]:
    """Those whose loss is looked at, 0 first, which is the trained model."""
    if not base:
        return SHARES[:1]
    return SHARES if share is None else tuple(dict.fromkeys((0.0, share)))


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that train and that the base has too, by name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and FUSION_NAME not in name:
            yield name, parameter


@torch.no_grad()
def _set(model: nn.Module, trained: Mapping[str, Tensor], base: Mapping[str, Tensor], share: float) -> None:
    for name, parameter in _trained(model):
        parameter.copy_(torch.lerp(trained[name], base[name], share))


@contextmanager
def _without_images(model: nn.Module) -> Iterator[None]:
    """Calls of `model`, whose arguments have names, get no images."""

    def drop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        others = {name: value for name, value in kwargs.items() if not name.startswith("image_")}
        return args, others | no_images(module, kwargs["input_ids"])

    hook = model.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
