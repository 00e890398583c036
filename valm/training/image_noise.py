"""Noise on the image vectors of a training, against a model that learns its pictures by heart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from valm.model.augment import fusion_module


def add_image_noise(model: Any, scale: float) -> None:
    """Makes `model`, in training mode, see each image vector in a random direction near its own.

    To each vector of a batch's pool a Gaussian vector is added whose expected length is about `scale` times the
    vector's. The sum gets the vector's length. With a scale of 1 its cosine to the vector is about 0.7. Each batch has
    other noise, from torch's random numbers. The model is changed; its weights and their names stay the same.

    Args:
        model: a causal language model with images.
    """

    def disturb(fusion: nn.Module, args: tuple[Tensor]) -> Tensor | None:
        if not fusion.training:
            return None
        vectors = args[0].float()
        length = vectors.norm(dim=-1, keepdim=True)
        noise = torch.randn_like(vectors) * (scale * length / vectors.shape[-1] ** 0.5)
        return F.normalize(vectors + noise, dim=-1) * length

    fusion_module(model).register_forward_pre_hook(disturb)
