"""All K images of a token or none, by its best score."""

import pickle

import numpy as np
import pytest
import torch

from tests.valm.tiny_clip import TEXTS
from valm.errors import ValmError
from valm.retrieval.context import ContextEncoder
from valm.retrieval.min_score import choose_min_score, cut
from valm.retrieval.retriever import Retriever

K = 3


@pytest.fixture(scope="module")
def retriever(clip, make_kb):
    return Retriever(ContextEncoder(clip), make_kb(30), K)


@pytest.fixture(scope="module")
def middle(retriever):
    """A cut between the best scores of two tokens, which is clear of their rounding."""
    _, scores = retriever.find(TEXTS)
    best = scores.amax(-1)[scores.amax(-1) > -torch.inf].sort().values
    return best[len(best) // 2 :][:2].mean().item()


def test_the_best_score_decides_and_a_score_exactly_at_the_cut_keeps():
    scores = torch.tensor([[0.5, 0.2], [0.5 - 2**-24, 0.4], [0.7, -torch.inf], [-torch.inf, -torch.inf]])
    ids = torch.tensor([[3, 4], [5, 6], [7, -1], [-1, -1]])
    found, kept = cut(ids, scores, 0.5)
    assert found.tolist() == [[3, 4], [-1, -1], [7, -1], [-1, -1]]
    assert torch.equal(kept[:1], scores[:1]) and (kept[1] == -torch.inf).all() and torch.equal(kept[2:], scores[2:])
    assert cut(ids, scores, None) == (ids, scores)
    assert all(map(torch.equal, cut(ids, scores, -1.0), (ids, scores)))
    assert cut(ids[:, :0], scores[:, :0], 0.5)[0].shape == (4, 0)


def test_a_retriever_cuts_whole_texts_and_steps_alike(retriever, middle):
    other = retriever.with_min_score(middle)
    ids, scores = retriever.find(TEXTS)
    expected, _ = cut(ids, scores, middle)
    seeing = (expected >= 0).any(-1)
    assert seeing.any() and (~seeing & (ids >= 0).any(-1)).any(), "nothing was cut, so the test says nothing"
    assert torch.equal(other.find(TEXTS)[0], expected)
    tokens = retriever.encoder.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    whole = other(tokens)
    assert torch.equal(whole.image_index[0] >= 0, expected[0, : tokens.shape[1]] >= 0)
    assert (
        len(whole.image_ids)
        == len(whole.image_index[whole.image_index >= 0].unique())
        < len(retriever(tokens).image_ids)
    )
    state = other.start(1)
    for at in range(tokens.shape[1]):
        found = other.step(tokens[:, at : at + 1], state)
        assert torch.equal(found.image_index[0, 0] >= 0, whole.image_index[0, at] >= 0)
        assert torch.equal(found.scores > -torch.inf, found.image_index >= 0)


def test_another_cut_shares_the_cache_and_leaves_the_retriever_as_it_is(retriever, middle):
    made = Retriever(retriever.encoder, retriever.kb, K, min_score=middle)
    cut_ids, _ = made.find(TEXTS)
    whole = made.with_min_score(None)
    assert whole.cache is made.cache and whole.index is made.index and made.min_score == middle
    ids, _ = whole.find(TEXTS)
    assert torch.equal(ids, retriever.find(TEXTS)[0]) and not torch.equal(ids, cut_ids)
    copied = pickle.loads(pickle.dumps(made))
    assert copied.min_score == middle and torch.equal(copied.find(TEXTS)[0], cut_ids)
    assert pickle.loads(pickle.dumps(whole)).min_score is None


@pytest.mark.parametrize("count", [1, 2, 5, 10, 19, 20, 21, 30, 50, 200])
def test_a_cut_is_chosen_from_questions_or_from_text(count):
    """Whatever their number, at most one in twenty questions loses its images, or one in twenty tokens keeps them."""
    random = np.random.default_rng(count)
    documents = [random.uniform(-1, 1, (9, K)).astype(np.float32) for _ in range(count)]
    for document in documents:
        document[0] = -np.inf  # the first token
    last = np.array([document[-1].max() for document in documents])
    found = choose_min_score(questions=documents)
    assert (last < np.float32(found)).sum() == count // 20
    every = np.concatenate([document[1:].max(-1) for document in documents])
    found = choose_min_score(text=documents)
    assert every.size // 20 - 2 <= (every >= np.float32(found)).sum() <= every.size // 20


def test_nothing_to_choose_a_cut_from():
    documents = [np.zeros((9, K), np.float32)]
    for nothing in ({"questions": documents[:0]}, {"text": []}, {"text": [np.full((1, K), -np.inf)]}):
        with pytest.raises(ValmError, match=f"the {next(iter(nothing))} to choose min_score from has no token"):
            choose_min_score(**nothing)
