"""Objects that threads share: every call returns what it does alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.threads import THREADS, at_once
from tests.tolerance import UNIT_VECTORS
from tests.valm.other_tokenizers import gpt2_like
from tests.valm.retrieval.indexed import K, make_indexed, queries, slow
from tests.valm.tiny_clip import TEXTS
from valm.retrieval import alignment
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever, SegmentCache

WORDS = " ".join(TEXTS).split()
ROUNDS = 3


def random_texts(seed: int) -> list[str]:
    """Some of few texts, so that threads meet in the cache, and some that no other thread has."""
    draw = random.Random(seed)
    return [draw.choice([draw.choice(TEXTS), " ".join(draw.choices(WORDS, k=draw.randint(1, 40)))]) for _ in range(3)]


@pytest.fixture(scope="module", params=["CLIP's tokenizer", "another tokenizer"])
def encoder(clip, request):
    tokenizer = None if request.param == "CLIP's tokenizer" else gpt2_like()
    return ContextEncoder(clip, tokenizer=tokenizer, dtype=torch.float64)


def test_a_segment_cache_counts_what_it_has():
    """Of segments that several threads miss, and cache, at once."""
    cache = SegmentCache(50)
    segments = {bytes([key]): (torch.full((7, K), key), torch.zeros(7, K)) for key in range(40)}

    def use(seed):
        draw = random.Random(seed)
        for _ in range(5000):
            key = bytes([draw.randrange(40)])
            found = cache.get(key)
            if found is None:
                cache.put(key, segments[key])
            else:
                assert found is segments[key]
            cache.count(found is not None, found is None)
            if draw.random() < 0.001:
                cache.clear()

    at_once(*[lambda seed=seed: use(seed) for seed in range(THREADS)])
    assert cache.tokens == sum(len(ids) for ids, _ in cache._segments.values()) <= 50
    assert cache.hits + cache.misses == 5000 * THREADS


@pytest.mark.parametrize("cache_tokens", [60, slow(1000)])
def test_a_retriever(encoder, make_kb, monkeypatch, cache_tokens):
    """Whole texts, and token by token with a state for each thread, beside the knowledge base itself."""
    monkeypatch.setattr(alignment, "WORD_CACHE", 20)
    kb = make_kb(30)
    retriever, alone = (Retriever(encoder, kb, 3, cache_tokens=tokens) for tokens in (cache_tokens, 0))
    batches = [[random_texts(100 * thread + number) for number in range(ROUNDS)] for thread in range(THREADS)]
    expected = [[alone.find(texts) for texts in of_thread] for of_thread in batches]
    vectors, items = kb.vectors(), [kb.item(id) for id in range(30)]
    tokens = encoder.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    whole = alone(tokens)

    def use(thread):
        for number, texts in enumerate(batches[thread]):
            ids, scores = retriever.find(texts)
            assert torch.equal(ids, expected[thread][number][0])
            torch.testing.assert_close(scores, expected[thread][number][1], rtol=0, atol=UNIT_VECTORS)
            some = np.random.default_rng(number).integers(0, 30, 9)
            assert np.array_equal(kb.gather(some), vectors[some])
            assert [kb.item(int(id)) for id in some] == [items[id] for id in some]
            assert kb.thumbnail(int(some[0])).size
        state = retriever.start(1)
        for at in range(tokens.shape[1]):
            found = retriever.step(tokens[:, at : at + 1], state)
            if at == 0:
                continue  # the first token has none
            assert torch.equal(found.image_ids[found.image_index[0, 0]], whole.image_ids[whole.image_index[0, at]])

    at_once(*[lambda thread=thread: use(thread) for thread in range(THREADS)])
    cache = retriever.cache
    assert cache.tokens == sum(len(ids) for ids, _ in cache._segments.values()) <= cache_tokens
    searched = sum(int((scores > -torch.inf).any(-1).sum()) for of_thread in expected for _, scores in of_thread)
    assert cache.hits + cache.misses == searched


def test_a_faiss_index(clip, tmp_path):
    pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")
    from valm.retrieval.faiss_index import FaissIndex

    for factory in ("IVF100,Flat", "IVF64,PQ8x4fs"):
        kb = make_indexed(clip, tmp_path / factory, target_recall=0.5, factory=factory)
        index = FaissIndex.open(kb)
        asked = [queries(kb, 20, seed) for seed in range(ROUNDS)]
        expected = [index.search(some, K) for some in asked]

        def use(index=index, asked=asked, expected=expected):
            for some, right in zip(asked, expected, strict=True):
                assert all(map(torch.equal, index.search(some, K), right))

        at_once(*[use] * THREADS)
