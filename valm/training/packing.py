"""Whether a model keeps the documents of a packed row apart."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from valm.augmented.probe import in_mode, probe_tokens
from valm.training.cache_below import no_images


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Whether each of two documents in a row, whose positions restart, has the logits that it has alone.

    Some families do not look at positions to tell documents apart, such as those with a state that goes on.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    ids = probe_tokens(model)
    half = ids.shape[1] // 2
    parts = ids[:, :half], ids[:, half:]
    positions = torch.cat([torch.arange(part.shape[1], device=ids.device) for part in parts])[None]
    with in_mode(model, training=False):
        try:
            packed = model(ids, position_ids=positions, use_cache=False, **no_images(model, ids)).logits
            alone = [model(part, use_cache=False, **no_images(model, part)).logits for part in parts]
        except (TypeError, ValueError, RuntimeError):  # of the family's own code
            return False
    expected = torch.cat(alone, 1)
    error = (packed - expected).abs().max().item()
    return error <= torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max().item()
