"""Whether a model keeps the documents of a packed row apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from valm.model.probe import in_mode, probe_tokens


@torch.no_grad()
def keeps_apart(model: Any, forward: Callable[..., Any]) -> bool:
    """Whether two documents in a row, whose positions restart, do not see each other.

    Some families do not look at positions to tell documents apart, such as those with a state that goes on.

    Args:
        forward: that of `model`, or of the class behind it.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    ids = probe_tokens(model)
    half = ids.shape[1] // 2
    parts = ids[:, :half], ids[:, half:]
    positions = torch.cat([torch.arange(part.shape[1], device=ids.device) for part in parts])[None]
    other = ids.clone()
    other[:, :half] = (ids[:, :half] + 1) % model.config.get_text_config(decoder=True).vocab_size

    def logits(tokens: Tensor, **arguments: Any) -> Tensor:
        return forward(input_ids=tokens, use_cache=False, **arguments).logits

    with in_mode(model, training=False):
        try:
            packed, changed = logits(ids, position_ids=positions), logits(other, position_ids=positions)
            alone = torch.cat([logits(part) for part in parts], 1)
        except (TypeError, ValueError, RuntimeError):  # of the family's own code
            return False
    largest, eps = packed.abs().max().item(), torch.finfo(packed.dtype).eps
    # The second document is the same whatever the first is. In 16 bits what little it sees of that may be as small as
    # the rounding, so there it must be the same to the bit.
    moved = (packed - changed)[:, half:].abs().max().item()
    if moved > (8 * eps * largest if packed.dtype.itemsize >= 4 else 0):
        return False
    return (packed - alone).abs().max().item() <= eps**0.5 * largest
