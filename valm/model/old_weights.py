"""Weights that a VaLM of an earlier version saved, whose fusion block had code and names of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from valm.store.files import is_file
from valm.store.pretrained import CONFIG_FILE, weight_files

# In the fusion block's attention: the earlier names and today's.
NAMES = {
    "image_proj": "image_fusion.proj.weight",
    "ln_img.weight": "image_fusion.norm.weight",
    "ln_img.bias": "image_fusion.norm.bias",
    "image_k_bias": "image_fusion.k_bias",
    "image_v_bias": "image_fusion.v_bias",
    "image_logit_bias": "image_fusion.logit_bias",
    "image_score_scale": "image_fusion.score_scale",
}
# One that every such model with images has.
MARK = ".attn.image_logit_bias"


def is_old(names: Any) -> bool:
    """Whether these are the names of the weights of an earlier version."""
    return any(name.endswith(MARK) for name in names)


def converted_weights(source: str | os.PathLike) -> dict[str, Tensor] | None:
    """The weights in the folder `source` by their names of today; None if they have these already."""
    if not is_file(Path(source) / CONFIG_FILE):
        return None
    files = [file for file in weight_files(Path(source)) if file.suffix == ".safetensors"]
    if not any(is_old(_names(file)) for file in files):
        return None
    files = weight_files(Path(source), complete=True)
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return converted(state)


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of an earlier version with the names and values of today.

    The earlier block multiplied images by W_k and W_v without the biases of these, so its own biases included them.
    """
    (mark,) = (name for name in state if name.endswith(MARK))
    attention = mark.removesuffix("image_logit_bias")
    found = {}
    for name, tensor in state.items():
        inside = name.removeprefix(attention)
        found[attention + NAMES[inside] if inside in NAMES else name] = tensor
    _, of_keys, of_values = state[f"{attention}c_attn.bias"].chunk(3)
    for name, bias in (("k_bias", of_keys), ("v_bias", of_values)):
        own = found[f"{attention}image_fusion.{name}"]
        found[f"{attention}image_fusion.{name}"] = own - bias.view_as(own)
    return found


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())
