import pickle

import numpy as np
import pytest

from tests.valm.training.documents import TOKENIZER, Vectors, documents
from valm.errors import ValmError
from valm.training.blocks import Blocks
from valm.training.collate import Collator
from valm.training.twins import TWINS, ShuffledImages, WithRandomImages, twin


@pytest.mark.parametrize("kind", TWINS)
def test_a_twin_sees_the_same_tokens_in_the_same_order(kind):
    made = documents(count=20)
    order = np.random.default_rng(0).permutation(20)
    blocks = [Blocks(data, 5, TOKENIZER.bos_token_id) for data in (made, twin(kind, made, 40, seed=3))]
    assert len(blocks[0]) == len(blocks[1]) > 20
    for index in order:
        assert list(blocks[0][index]["input_ids"]) == list(blocks[1][index]["input_ids"])


@pytest.mark.parametrize("kind", ["text", "blind"])
def test_a_text_twin_has_no_images(kind):
    made = twin(kind, documents(), 40, 0)
    assert all(list(document) == ["input_ids"] for document in made)
    assert "image_pool" not in Collator(TOKENIZER, None)(list(made))


def test_ids_that_cannot_say_no_image_are_refused():
    made = [document | {"image_ids": document["image_ids"].astype(np.uint32)} for document in documents(count=1)]
    with pytest.raises(ValmError, match="image_ids of document 0 are uint32, which has no -1"):
        WithRandomImages(made, 40, seed=1)[0]


def test_random_images_are_as_many_different_ones_of_the_knowledge_base():
    made = documents(num_images=3, count=200)
    drawn = WithRandomImages(made, 40, seed=1)
    for document, found in zip(made, drawn, strict=True):
        assert found["image_ids"].dtype == np.int64
        assert ((found["image_ids"] == -1) == (document["image_ids"] == -1)).all()
        assert all(len(set(row)) == len(row) for row in (row[row != -1] for row in found["image_ids"]))
    every = np.concatenate([found["image_ids"].ravel() for found in drawn])
    counts = np.bincount(every[every != -1], minlength=40)
    expected = counts.sum() / 40
    # chi-square with 39 degrees of freedom: above 73 once in a thousand seeds
    assert len(counts) == 40 and ((counts - expected) ** 2 / expected).sum() < 73
    Collator(TOKENIZER, Vectors(40))(list(drawn))


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_exchanged_images_have_no_scores(kind):
    made = [{**document, "image_scores": np.ones(document["image_ids"].shape, np.float32)} for document in documents()]
    assert all(set(document) == {"input_ids", "image_ids"} for document in twin(kind, made, 40, seed=1))


def test_all_images_can_be_drawn():
    """K of K: each row is a permutation."""
    images = np.zeros((50, 4), np.int64)
    (found,) = WithRandomImages([{"input_ids": [0] * 50, "image_ids": images}], 4, seed=0)
    assert all(sorted(row) == [0, 1, 2, 3] for row in found["image_ids"].tolist())
    assert len(np.unique(found["image_ids"], axis=0)) > 10


def test_shuffled_images_are_those_of_another_token_each():
    # images that name their token
    lengths, made, token = [4, 1, 7, 3], [], 0
    for length in lengths:
        ids = np.arange(token, token + length)
        made.append({"input_ids": ids, "image_ids": np.stack([ids, ids + 100], axis=1)})
        token += length
    shuffled = ShuffledImages(made, seed=2)
    tokens = np.concatenate([document["input_ids"] for document in shuffled])
    images = np.concatenate([document["image_ids"] for document in shuffled])
    assert (tokens == np.arange(15)).all()
    assert sorted(images[:, 0]) == list(range(15)) and (images[:, 1] == images[:, 0] + 100).all()
    assert (images[:, 0] != tokens).all()


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_a_seed_decides_the_images_whoever_reads_them(kind):
    def images(data, order):
        found = {index: data[index]["image_ids"].tolist() for index in order}
        return [found[index] for index in range(8)]

    data = twin(kind, documents(), 40, seed=5)
    forth = images(data, range(8))
    assert images(pickle.loads(pickle.dumps(data)), reversed(range(8))) == forth
    assert images(twin(kind, documents(), 40, seed=6), range(8)) != forth


def test_wrong_twins_are_named():
    with pytest.raises(ValmError, match="twin must be one of text, random, blind, shuffled, got 'blond'"):
        twin("blond", documents(), 40, 0)
    for kind in ("random", "shuffled"):
        with pytest.raises(ValmError, match="document 0 has no image_ids to be replaced"):
            twin(kind, [{"input_ids": [1, 2]}], 40, 0)[0]
