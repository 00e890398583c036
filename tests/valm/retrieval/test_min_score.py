"""All K images of a token or none, by its best score."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch

from valm.errors import ValmError
from valm.retrieval.min_score import choose_min_score, cut, set_min_score

K = 3


def test_the_best_score_decides_and_a_score_exactly_at_the_cut_keeps():
    scores = torch.tensor([[0.5, 0.2], [0.5 - 2**-24, 0.4], [0.7, -torch.inf], [-torch.inf, -torch.inf]])
    ids = torch.tensor([[3, 4], [5, 6], [7, -1], [-1, -1]])
    found, kept = cut(ids, scores, 0.5)
    assert found.tolist() == [[3, 4], [-1, -1], [7, -1], [-1, -1]]
    assert torch.equal(kept[:1], scores[:1]) and (kept[1] == -torch.inf).all() and torch.equal(kept[2:], scores[2:])
    assert cut(ids, scores, None) == (ids, scores)
    assert all(map(torch.equal, cut(ids, scores, -1.0), (ids, scores)))
    assert cut(ids[:, :0], scores[:, :0], 0.5)[0].shape == (4, 0)


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


def test_it_is_set_where_a_model_retrieves():
    seeing, twin = (Mock(**{"fusion_options.retrieves": retrieves}) for retrieves in (True, False))
    set_min_score(seeing, 0.5, "model")
    seeing.set_min_score.assert_called_once_with(0.5)
    with pytest.warns(UserWarning, match="--min-score has no effect on twin, which retrieves no images"):
        set_min_score(twin, 0.5, "twin")
    twin.set_min_score.assert_not_called()
