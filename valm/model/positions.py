"""Changes the arguments of an attention's call to other tokens and other positions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

# Names of the key-value cache in the attention forwards of different families.
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")


class AttentionCall(NamedTuple):
    """A call of an attention: its arguments by name, and the position of its last token."""

    arguments: dict[str, Any]
    position: int


class TokensBefore(Cache):
    """A cache without keys that reports how many tokens came before; some families scale queries by that number."""

    def __init__(self, length: int | Tensor):
        self.length = length

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int | Tensor:  # type: ignore[override]  # of a static cache
        return self.length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def named_arguments(names: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(names, args, strict=False)) | kwargs


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The key-value cache among the arguments of a call; None if there is none."""
    return next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)


def alone(hidden_states: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an attention's call for other `hidden_states` (B, T, C), without mask and cache. All tokens are
    at the position of the call's last token."""
    rows, length = hidden_states.shape[:2]
    tokens = arguments["hidden_states"].shape[1]

    def last_rotation(table: Tensor) -> Tensor:
        return table[..., :1, -1:, :].expand(*table.shape[:-3], rows, length, -1)

    replaced = {}
    for name, value in arguments.items():
        if name == "hidden_states":
            value = hidden_states
        elif isinstance(value, Cache) or name in (*CACHE_ARGUMENTS, "attention_mask"):
            value = None
        elif name == "use_cache":
            value = False
        elif name == "position_embeddings" and value is not None:
            value = _map_tables(last_rotation, value)
        elif name == "position_ids" and value is not None:
            value = value[..., :1, -1:].expand(*value.shape[:-2], rows, length)
        elif isinstance(value, Tensor) and tokens in value.shape[1:]:  # such as Beam's scale of each query
            value = value[:1].narrow(value.shape.index(tokens, 1), tokens - 1, 1)
        elif isinstance(value, MutableMapping):  # such as keys that later layers read
            value = copy.copy(value)
        replaced[name] = value
    return replaced


def _map_tables(function: Callable[[Tensor], Tensor], tables: Any) -> Any:
    if isinstance(tables, Tensor):
        return function(tables)
    if isinstance(tables, Mapping):
        return {name: _map_tables(function, inner) for name, inner in tables.items()}
    return tuple(_map_tables(function, inner) for inner in tables)


def identity_rotation(position_embeddings: Any) -> Any:
    """Rotary embeddings (..., D) of the same shape that rotate by no angle.

    A scale (YaRN), which is the length of (cos, sin), is preserved.
    """
    if isinstance(position_embeddings, Tensor):  # complex numbers, in Llama 4
        return torch.ones_like(position_embeddings)
    if isinstance(position_embeddings, Mapping):  # of several kinds, in DeepSeek V4
        return {name: identity_rotation(tables) for name, tables in position_embeddings.items()}
    cos, sin = position_embeddings
    first = (..., slice(1), slice(1), slice(None))
    scale = torch.hypot(cos[first].float(), sin[first].float()).to(cos.dtype).expand_as(cos)
    return scale, torch.zeros_like(scale)


def positions(model: Any) -> int | None:
    """The maximum number of tokens that a model can read; None if its config does not say."""
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return found if found is None or found > 0 else None  # -1 in XLNet
