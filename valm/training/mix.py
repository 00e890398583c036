"""Mixes the trained weights of a pretrained decoder with its original weights (WiSE-FT, Wortsman et al. 2022).

A layer that trains on little text gets worse at other text; a share of its original weights undoes part of that. The
share is given, or chosen by the loss on held-out text.
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
    """Copies on the CPU of the trained parameters that the base also contains, by name."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in _trained(model)}


def mix(training: ImageTrainer, base: Mapping[str, Tensor], share: float | None = None) -> dict[str, float]:
    """Replaces each trained weight with (1 - share) × itself + share × the base's weight.

    New parameters are unchanged. All processes call it and choose the same share.

    Args:
        training: after its `train()`, with documents to evaluate on; optional if a share is given.
        base: the `base_weights` of its model before the training.
        share: by default, the share in SHARES with the lowest held-out loss (the first if several are equal).

    Returns:
        Numbers for the model card: `base_share`, if anything can be mixed; on held-out documents, `eval_loss` and
        `eval_perplexity` of the mixed model, and the perplexities of the base, of the trained model and, if it sees
        images, of the mixed model without images.
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
        of_base = loss(1.0)  # new parameters have no effect
    losses = {share: loss(share) for share in _shares(base, share)}
    chosen = min(losses, key=lambda share: losses[share]) if share is None else share
    with _without_images(model):
        without_images = loss(chosen)  # the model keeps the chosen share
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
    """The shares to evaluate; 0, the trained model, is first."""
    if not base:
        return SHARES[:1]
    return SHARES if share is None else tuple(dict.fromkeys((0.0, share)))


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters that the base also contains, by name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and FUSION_NAME not in name:
            yield name, parameter


@torch.no_grad()
def _set(model: nn.Module, trained: Mapping[str, Tensor], base: Mapping[str, Tensor], share: float) -> None:
    for name, parameter in _trained(model):
        parameter.copy_(torch.lerp(trained[name], base[name], share))


@contextmanager
def _without_images(model: nn.Module) -> Iterator[None]:
    """Within the block, calls of `model` with keyword arguments get no images."""

    def drop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        others = {name: value for name, value in kwargs.items() if not name.startswith("image_")}
        return args, others | no_images(module, kwargs["input_ids"])

    hook = model.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
