"""A batch of texts that a model continues token by token; a text joins or leaves between two tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from valm.errors import ValmError
from valm.model.positions import CACHE_ARGUMENTS
from valm.retrieval.retriever import Retrieved

# Layers of a cache whose rows can be padded on the left. The last kind contains no keys: another layer's keys are read.
PADDED = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


class Seen(NamedTuple):
    """A model's results for the tokens that it read: logits (B, T, V), and the image_ids and scores (B, T, K) of each
    token, -1 and -inf = no image; None for a model without images."""

    logits: Tensor
    image_ids: Tensor | None
    scores: Tensor | None


class Batch:
    """Rows of text with their keys and values, and the retriever's state. Shorter texts are padded on the left.

    Args:
        model: as `valm.load` returns it, in eval mode.
        positions: give the model positions even without padding (`needs_positions`).
    """

    def __init__(self, model: Any, positions: bool = False):
        self.model, self.positions = model, positions
        self.retriever = model.retriever if model.fusion_options.num_images > 0 else None
        self.cache: Any = None
        self.mask = torch.empty(0, 0, dtype=torch.int64)  # (B, T): 1 = a token, 0 = padding
        self.ids = torch.empty(0, 0, dtype=torch.int64)  # (B, T)
        self.state: Any = None

    def __len__(self) -> int:
        return len(self.mask)

    def begin(self, texts: list[Tensor], all_logits: bool = False) -> Seen:
        """Reads the first tokens (T,) of new rows of an empty batch.

        Args:
            all_logits: return the logits of every token, not only of the last (T = 1).
        """
        length = max(map(len, texts))
        self.ids = torch.stack([_padded(text, length, 0) for text in texts])
        self.mask = torch.stack([_padded(torch.ones_like(text), length, 0) for text in texts])
        if self.retriever is not None:
            self.state = self.retriever.start(len(texts))
        return self._read(self.ids, all_logits)

    def read(self, ids: Tensor) -> Seen:
        """Reads the next tokens (B, T) of each row; returns the last token's logits (T = 1)."""
        self.mask, self.ids = torch.cat([self.mask, torch.ones_like(ids)], 1), torch.cat([self.ids, ids], 1)
        return self._read(ids, all_logits=False)

    @torch.no_grad()
    def _read(self, ids: Tensor, all_logits: bool) -> Seen:
        first = self.cache is None
        seen = images = self._seen(ids, self.state)
        if not first and self.mask.shape[1] == rotates_anew_after(self.model) + 1:  # only a single row becomes so long
            ids, self.cache, first = self.ids, None, True
            images = self._seen(ids)
        inputs: dict[str, Any] = {"attention_mask": self.mask, "use_cache": True, "is_first_iteration": first}
        if self.positions or not bool(self.mask.all()):  # without padding, most models compute positions
            inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if self.cache is not None:
            inputs["cache"] = self.cache
        if images is not None:
            inputs |= self.model.finder.arguments(images)
        prepared = self.model.prepare_inputs_for_generation(ids, **inputs)
        if self.model._supports_logits_to_keep():  # replaces a family's own value
            prepared["logits_to_keep"] = 0 if all_logits else 1  # 0: all
        output = self.model(**prepared, return_dict=True)
        self.cache = next((output[name] for name in CACHE_ARGUMENTS if output.get(name) is not None), None)
        logits = (output.logits if all_logits else output.logits[:, -1:]).float()
        if seen is None:
            return Seen(logits, None, None)
        none = seen.image_index.new_full((1,), -1)  # at index -1
        return Seen(logits, torch.cat([seen.image_ids, none])[seen.image_index], seen.scores)

    def _seen(self, ids: Tensor, state: Any = None) -> Retrieved | None:
        """The images of `ids`, which continue `state` or are a whole text; None for a model without images."""
        if self.retriever is None:
            return None
        mask = self.mask[:, -ids.shape[1] :]
        of = None if bool(mask.all()) else mask
        found = self.retriever(ids, of) if state is None else self.retriever.step(ids, state, of)
        return self.model.finder.seen(found, ids.device)

    def join(self, other: Batch) -> None:
        """Adds the rows of another batch of the same model, which becomes empty."""
        if len(self) == 0:
            self.cache, self.mask, self.ids, self.state = other.cache, other.mask, other.ids, other.state
        else:
            length = max(self.mask.shape[1], other.mask.shape[1])
            joined = [_joined(*both) for both in zip(self.cache.layers, other.cache.layers, strict=True)]
            self.mask, self.ids = (
                torch.cat([_padded(own, length, 1), _padded(others, length, 1)])
                for own, others in ((self.mask, other.mask), (self.ids, other.ids))
            )
            if self.state is not None:
                self.state.join(other.state)
            for layer, tensors in zip(self.cache.layers, joined, strict=True):  # from here on, nothing can fail
                _set(layer, tensors, length)
        other.keep([])

    def keep(self, rows: list[int]) -> None:
        """Keeps only these rows, in this order, and only the padding that they need."""
        if not rows:
            self.cache, self.state, self.mask, self.ids = None, None, self.mask[:0, :0], self.ids[:0, :0]
            return
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[index]
        needed = int(self.mask.sum(1).max())
        self.mask, self.ids = self.mask[:, -needed:], self.ids[index, -needed:]
        for layer in self.cache.layers:
            if not isinstance(layer, DummyLayer):
                _set(layer, (layer.keys[index, :, -needed:], layer.values[index, :, -needed:]), needed)
        if self.state is not None:
            self.state.reorder(index)


def needs_positions(model: Any) -> bool:
    """Whether the model reads a token after a cache correctly only if its position is given; tested on a text. Raises
    ValmError if the model reads the token correctly neither way."""
    ids = _ids(model, 12)
    whole = Batch(model).begin([ids[0]]).logits
    for positions in (False, True):
        batch = Batch(model, positions)
        try:
            batch.begin([ids[0, :8]])
            found = torch.cat([batch.read(ids[:, place : place + 1]).logits for place in range(8, 12)])[-1:]
        except TypeError:  # the model takes no positions
            continue
        if _is_same(model, found, whole):
            return positions
    raise ValmError(
        f"{type(model).__name__} cannot be served: token by token, its output differs from the output for a whole text"
    )


def can_join(model: Any, positions: bool = False, tokens: tuple[int, int] = (4, 32)) -> bool:
    """Whether rows of the model can be padded on the left. Tested on two texts with the given numbers of `tokens`,
    which begin together or join, and must be read as if each were by itself. If rotation or scale depend on the longest
    row, the config shows it: so few tokens do not."""
    config = model.config.get_text_config(decoder=True)
    if _rope_types(config) & {"longrope", "dynamic"} or getattr(config, "attn_temperature_tuning", False):
        return False
    ids = _ids(model, sum(tokens) + 2)[0]
    *texts, following = torch.split(ids, [*tokens, 2])
    alone, joined, together = [], Batch(model, positions), Batch(model, positions)
    try:
        for text, next_id in zip(texts, following, strict=True):
            one, joining = Batch(model, positions), Batch(model, positions)
            one.begin([text])
            alone.append(one.read(next_id[None, None]).logits)
            joining.begin([text])
            if joining.cache is None or any(type(layer) not in PADDED for layer in joining.cache.layers):
                return False
            joined.join(joining)
        together.begin(texts)
        found = torch.stack([batch.read(following[:, None]).logits for batch in (joined, together)])
    except (AttributeError, TypeError, ValueError, RuntimeError):  # another kind of cache
        return False
    return _is_same(model, found, torch.cat(alone))


def rotates_anew_after(model: Any) -> float:
    """The number of tokens after which all keys are rotated differently (LongRoPE, as in Phi-3), else infinity."""
    config = model.config.get_text_config(decoder=True)
    if "longrope" not in _rope_types(config):
        return float("inf")
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("original_max_position_embeddings") or config.original_max_position_embeddings


def _rope_types(config: Any) -> set[str]:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # for several kinds of layers
    return {kind["rope_type"] for kind in kinds if isinstance(kind.get("rope_type"), str)}


def _ids(model: Any, count: int) -> Tensor:
    """(1, count) ordinary tokens of the vocabulary, because padding may get no position."""
    config = model.config.get_text_config(decoder=True)
    special = [getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
    special += [id for ids in special if isinstance(ids, list) for id in ids]
    ordinary = [id for id in range(min(config.vocab_size, 2 * count)) if id not in special]
    return torch.tensor([(ordinary * count)[:count]], device=model.device)


def _is_same(model: Any, found: Tensor, expected: Tensor) -> bool:
    rounding = 1e-3 if model.dtype == torch.float32 else 5e-2
    return bool((found - expected).abs().max() <= rounding * expected.abs().max())


def _padded(tensor: Tensor, length: int, dim: int) -> Tensor:
    """`tensor` with zeros before it in `dim`, up to `length`."""
    shape = list(tensor.shape)
    shape[dim] = length - shape[dim]
    return tensor if shape[dim] == 0 else torch.cat([tensor.new_zeros(shape), tensor], dim)


def _joined(layer: Any, other: Any) -> tuple[Tensor, Tensor] | None:
    """The keys and values of the rows of both layers; None for a layer without keys."""
    if isinstance(layer, DummyLayer):
        return None
    kept = max(layer.keys.shape[-2], other.keys.shape[-2])
    keys, values = (
        torch.cat([_padded(own, kept, 2), _padded(others, kept, 2)])
        for own, others in ((layer.keys, other.keys), (layer.values, other.values))
    )
    return keys, values


def _set(layer: Any, tensors: tuple[Tensor, Tensor] | None, length: int) -> None:
    """Sets a layer's keys and values of `length` tokens with padding; a window may keep only the last of them."""
    if tensors is None:
        return
    layer.keys, layer.values = tensors
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length
