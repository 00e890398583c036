"""A cache of transformers that also holds the retriever's state and reorders it with its rows."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import Cache

from valm.model.subclasses import subclass
from valm.retrieval.context import ContextCache
from valm.retrieval.retriever import ImageRetriever


class RetrievalCache(Cache):
    """Mixin of a cache that also holds the retriever's state."""

    retrieval: ContextCache | None = None
    # ids and mask (B, T) of the text that a model read before it returned this cache; `retrieval` starts with it
    text: tuple[Tensor, Tensor | None] | None = None
    num_retrieved = 0  # tokens that `retrieval` has read
    retriever_number: int | None = None  # the retriever whose images these tokens saw (`ImageFinder`)
    is_croppable = False

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Always raises: the retriever's state cannot be rolled back."""
        raise NotImplementedError(
            f"a {type(self).__name__} with a retriever's state cannot be cropped: do not use assisted decoding"
        )

    def reset(self) -> None:
        super().reset()
        self.retrieval = self.text = self.retriever_number = None
        self.num_retrieved = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i]."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # any tensor of integers will do
        # MiniMax's states of linear attention ([] = none), which its class reorders only in batch_select_indices
        states: list[Any] = getattr(self, "linear_cache", [])
        for layer, state in enumerate(states):
            if isinstance(state, Tensor):
                states[layer] = state[beam_idx.to(state.device)]
        self.select_state(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.select_state(indices)

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Always raises: a cache does not know how many rows it has."""
        raise NotImplementedError("a cache with a retriever's state cannot repeat its rows: call reorder_cache")

    def select_state(self, rows: Tensor) -> None:
        """Reorders what the cache holds besides keys and values."""
        if self.retrieval is not None:
            self.retrieval.reorder(rows)
        if self.text is not None:
            ids, mask = self.text
            at = rows.to(ids.device)
            self.text = ids[at], None if mask is None else mask[at]


def retrieval_cache_class(base: Any) -> Any:
    return subclass(RetrievalCache, base, retrieval_cache_class)


def with_retrieval(cache: Any) -> RetrievalCache:
    """`cache` itself, with a class that also holds a retriever's state. `generate` and the user hold this object and
    reorder it by its methods. Methods set on the object would refer back to it, and such a reference cycle stays in
    memory until Python's garbage collector runs."""
    if not isinstance(cache, RetrievalCache):
        cache.__class__ = retrieval_cache_class(type(cache))
    return cache


def retrieval_state(cache: Any, retriever: ImageRetriever, batch: int, number: int) -> ContextCache:
    """The retriever's state after the tokens in the cache. number: identifies the retriever among the model's. Raises
    ValueError if the retriever has not read these tokens."""
    cache = with_retrieval(cache)
    if cache.retriever_number not in (None, number):
        raise ValueError("the tokens in the cache saw another retriever's images: start with an empty cache")
    cache.retriever_number = number
    if cache.retrieval is None:
        cache.retrieval = retriever.start(batch)
        if cache.text is not None:
            ids, mask = cache.text
            retriever.step(ids, cache.retrieval, mask)
            cache.text, cache.num_retrieved = None, ids.shape[1]
    if cache.num_retrieved != cache.get_seq_length():
        raise ValueError(
            f"the cache contains {cache.get_seq_length()} tokens, but the retriever has read {cache.num_retrieved}: "
            "the other tokens were read without a retriever or with given images; start with an empty cache"
        )
    return cache.retrieval
