"""The controls exchange the pictures and nothing else."""

import numpy as np
import pytest
import torch
from PIL import Image

from valm.demo.questions import Replaced, plain_question, shuffled, swap_red_and_blue
from valm.evaluation.color import ColorItem
from valm.retrieval.retriever import Retrieved


class FakeBase:
    def vectors(self) -> np.ndarray:
        return np.arange(40, dtype=np.float16).reshape(10, 4)


class FakeRetriever:
    k, dim = 2, 4

    def __call__(self, input_ids, attention_mask=None) -> Retrieved:
        pool = torch.zeros(2, 4)
        return Retrieved(pool, torch.tensor([[[0, 1]]]), torch.tensor([3, 7]), torch.zeros(1, 1, 2))

    def start(self, batch):
        return [batch]

    def step(self, input_ids, state, attention_mask=None) -> Retrieved:
        state.append(input_ids)
        return self(input_ids, attention_mask)


def test_replaced_finds_the_same_and_hands_out_others():
    vectors = torch.randn(10, 4)
    replaced = Replaced(FakeRetriever(), vectors)
    plain, other = FakeRetriever()(torch.zeros(1, 1)), replaced(torch.zeros(1, 1))
    assert (replaced.k, replaced.dim) == (2, 4)
    assert torch.equal(other.image_pool, vectors[[3, 7]])
    assert torch.equal(other.image_index, plain.image_index) and torch.equal(other.image_ids, plain.image_ids)


def test_replaced_serves_cached_generation():
    vectors = torch.randn(10, 4)
    replaced = Replaced(FakeRetriever(), vectors)
    state, ids = replaced.start(1), torch.zeros(1, 1)
    other = replaced.step(ids, state)
    assert state == [1, ids]  # the retriever's own state, and it moved on
    assert torch.equal(other.image_pool, vectors[[3, 7]])


def test_shuffled_is_a_permutation_by_seed():
    first, again, other = (shuffled(FakeBase(), seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert sorted(first[:, 0].tolist()) == [4.0 * i for i in range(10)]


def test_swap_turns_red_into_blue_and_leaves_grey():
    red = swap_red_and_blue(Image.new("RGB", (1, 1), (200, 10, 20)))
    assert red.getpixel((0, 0)) == (20, 10, 200)
    assert swap_red_and_blue(Image.new("RGB", (1, 1), (9, 9, 9))).getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize(
    ("descriptor", "question"),
    [("a", "The color of a bat is"), ("", "The color of bat is"), (None, "The color of the bat is")],
)
def test_plain_question(descriptor, question):
    assert plain_question(ColorItem("bat", "black", descriptor)) == question
