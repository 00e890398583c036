"""Texts that a model reads together, one more token of each at a time; a text joins or leaves between two tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from valm.model.positions import CACHE_ARGUMENTS
from valm.retrieval.min_score import cut

# Layers of a cache whose rows can be padded on the left; the last kind has no keys, as those of another layer are read.
PADDED = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


class Seen(NamedTuple):
    """What a model has made of the tokens that it read: logits (B, T, V), and the images of each token, image_ids and
    scores (B, T, K), -1 and -inf = none; None for a model without images."""

    logits: Tensor
    image_ids: Tensor | None
    scores: Tensor | None


class Batch:
    """Rows of text with their keys and values, and the retriever's state. Shorter texts are padded on the left.

    Args:
        model: as `valm.load` returns it; it is in eval mode.
    """

    def __init__(self, model: Any):
        self.model = model
        self.retriever = model.retriever if model.fusion_options.num_images > 0 else None
        self.cache: Any = None
        self.mask = torch.empty(0, 0, dtype=torch.int64)  # (B, T): 1 = a token, 0 = padding
        self.state: Any = None

    def __len__(self) -> int:
        return len(self.mask)

    @torch.no_grad()
    def read(self, ids: Tensor, all_logits: bool = False) -> Seen:
        """Reads the next tokens (B, T) of each row; of an empty batch, the first ones of new rows, without padding.

        Args:
            all_logits: of every token; otherwise the last one's alone, T = 1 of the result.
        """
        first = len(self) == 0
        before = ids[:, :0] if first else self.mask.to(ids.device)
        self.mask = torch.cat([before, torch.ones_like(ids)], 1)
        images, image_ids, scores = self._images(ids, first)
        inputs: dict[str, Any] = {"attention_mask": self.mask, "use_cache": True, "is_first_iteration": first}
        if not bool(self.mask.all()):  # without padding a model knows the positions itself
            inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if self.cache is not None:
            inputs["cache"] = self.cache
        if not all_logits and self.model._supports_logits_to_keep():
            inputs["logits_to_keep"] = 1
        prepared = self.model.prepare_inputs_for_generation(ids, **inputs, **images)
        output = self.model(**prepared, return_dict=True)
        self.cache = next((output[name] for name in CACHE_ARGUMENTS if output.get(name) is not None), None)
        logits = output.logits if all_logits else output.logits[:, -1:]
        return Seen(logits.float(), image_ids, scores)

    def _images(self, ids: Tensor, first: bool) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """The arguments of the model that have the images of `ids`, and their ids and scores."""
        if self.retriever is None:
            return {}, None, None
        if first:
            self.state = self.retriever.start(len(ids))
        found = self.retriever.step(ids, self.state)
        options = self.model.fusion_options
        index, scores = cut(found.image_index, found.scores, options.min_score)
        images = {"image_pool": found.image_pool.to(ids.device), "image_index": index.to(ids.device)}
        if options.scored:
            images["image_scores"] = scores.to(ids.device)
        # a pool may be empty
        image_ids = torch.cat([found.image_ids.to(index), index.new_full((1,), -1)])[index]
        return images, image_ids, scores

    def join(self, other: Batch) -> None:
        """Adds the rows of another batch of the same model, which is empty then."""
        if len(self) == 0:
            self.cache, self.mask, self.state = other.cache, other.mask, other.state
        else:
            length = max(self.mask.shape[1], other.mask.shape[1])
            for own, others in zip(self.cache.layers, other.cache.layers, strict=True):
                _join(own, others, length)
            self.mask = torch.cat([_padded(self.mask, length, 1), _padded(other.mask, length, 1)])
            if self.state is not None:
                self.state.join(other.state)
        other.cache, other.state, other.mask = None, None, other.mask[:0, :0]

    def keep(self, rows: list[int]) -> None:
        """Keeps these rows alone, in this order, and no more padding than they need."""
        if not rows:
            self.cache, self.state, self.mask = None, None, self.mask[:0, :0]
            return
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[index]
        needed = int(self.mask.sum(1).max())
        self.mask = self.mask[:, self.mask.shape[1] - needed :]
        for layer in self.cache.layers:
            _keep(layer, index, needed)
        if self.state is not None:
            self.state.reorder(index)


def can_join(model: Any, tokens: tuple[int, int] = (4, 32)) -> bool:
    """Whether rows of the model can be padded on the left: tried on two texts of so many tokens, which must be read
    together as each by itself."""
    ids = (
        torch.arange(sum(tokens) + 2, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size
    )
    texts, following = torch.split(ids[:, : sum(tokens)], list(tokens), 1), ids[:, sum(tokens) :].T  # (2, 1)
    alone, together = [], Batch(model)
    try:
        for text, next_id in zip(texts, following, strict=True):
            one, joining = Batch(model), Batch(model)
            one.read(text)
            alone.append(one.read(next_id[None]).logits)
            joining.read(text)
            if joining.cache is None or any(type(layer) not in PADDED for layer in joining.cache.layers):
                return False
            together.join(joining)
        found = together.read(following).logits
    except (AttributeError, TypeError, ValueError, RuntimeError):  # of a cache of another kind
        return False
    expected = torch.cat(alone)
    rounding = 1e-3 if model.dtype == torch.float32 else 5e-2
    return bool((found - expected).abs().max() <= rounding * expected.abs().max())


def _padded(tensor: Tensor, length: int, dim: int) -> Tensor:
    """`tensor` with zeros before it in `dim`, up to a `length`."""
    shape = list(tensor.shape)
    shape[dim] = length - shape[dim]
    return tensor if shape[dim] == 0 else torch.cat([tensor.new_zeros(shape), tensor], dim)


def _join(layer: Any, other: Any, length: int) -> None:
    """Adds the rows of `other` to the layer of a cache, where both have `length` tokens, with padding."""
    if isinstance(layer, DummyLayer):
        return
    kept = max(layer.keys.shape[-2], other.keys.shape[-2])
    layer.keys = torch.cat([_padded(layer.keys, kept, 2), _padded(other.keys, kept, 2)])
    layer.values = torch.cat([_padded(layer.values, kept, 2), _padded(other.values, kept, 2)])
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length


def _keep(layer: Any, rows: Tensor, length: int) -> None:
    """Keeps rows of the layer of a cache, and their last `length` tokens."""
    if isinstance(layer, DummyLayer):
        return
    layer.keys = layer.keys[rows, :, -length:]
    layer.values = layer.values[rows, :, -length:]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length
