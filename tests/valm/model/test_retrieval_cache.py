"""The retriever's state in a cache of transformers."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from valm.model.retrieval_cache import RetrievalCache, with_retrieval


class Rows:
    """A retriever's state that knows which row each of its rows came from."""

    def __init__(self, rows):
        self.rows = torch.as_tensor(rows)

    def reorder(self, beam_idx):
        self.rows = self.rows[beam_idx]


def test_the_retrievers_state_moves_with_the_rows_of_any_cache():
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8), 0)
    assert with_retrieval(cache) is cache
    assert isinstance(cache, DynamicCache) and isinstance(cache, RetrievalCache)
    cache.retrieval = Rows([0, 1])
    with pytest.raises(NotImplementedError, match="reorder_cache"):
        cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0, 0, 0]))
    assert cache.retrieval.rows.tolist() == [1, 0, 0, 0]
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert cache.retrieval.rows.tolist() == [1, 0]
    with pytest.raises(NotImplementedError, match="assisted decoding"):
        cache.crop(1)
    cache.reset()
    assert cache.retrieval is None


def test_minimaxs_linear_attention_moves_with_the_rows():
    """The layers here are full, linear and full attention; MiniMax's own batch_select_indices fails with them."""
    cache = MiniMaxCache()
    state = torch.arange(2.0).view(2, 1, 1, 1)
    cache.set_linear_cache(1, state)
    for layer in (0, 2):
        cache.update(state, state, layer)
    with_retrieval(cache).reorder_cache(torch.tensor([1, 1]))
    for rows in (cache.layers[0].keys, cache.linear_cache[1], cache.layers[2].values):
        assert rows.flatten().tolist() == [1, 1]
