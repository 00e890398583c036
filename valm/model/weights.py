"""Attention weights of an augmented model's fusion layer, which `forward` never materialises."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from valm.model.attention import joint_weights


def fusion_weights(model: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The weights over text (B, H, T, T) and over images (B, H, T, K) of an augmented model on `inputs`; of one that
    goes through its layers several times, as HRM does, those of the last time."""
    found: list[tuple[Tensor, Tensor]] = []
    model(**inputs, use_cache=False, read_weights=lambda *arguments: found.append(joint_weights(*arguments)))
    return found[-1]
