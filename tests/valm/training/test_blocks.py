import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from valm.errors import ValmError
from valm.training.blocks import Blocks

SOT = 99


def document(length, seed=0):
    images = np.random.default_rng(seed).integers(0, 50, (length, 2))
    return {"input_ids": [SOT, *range(length - 1)], "image_ids": images}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(2, 12))
def test_every_token_is_in_one_block_with_the_pictures_of_its_document(lengths, size):
    documents = [document(length, seed) for seed, length in enumerate(lengths)]
    data = Blocks(documents, size, SOT)
    blocks = list(data)
    assert data.lengths().tolist() == [len(block["input_ids"]) for block in blocks]
    assert all(1 <= len(block["input_ids"]) <= size for block in blocks)
    assert all(block["input_ids"][0] == SOT for block in blocks)
    # blocks of one document follow one another: without SOT they are the documents
    tokens = [id for block in blocks for id in list(block["input_ids"])[1:]]
    assert tokens == [id for made in documents for id in made["input_ids"][1:]]
    images = np.concatenate([block["image_ids"][1:] for block in blocks])
    assert np.array_equal(images, np.concatenate([made["image_ids"][1:] for made in documents]))
    firsts = {tuple(block["image_ids"][0]) for block in blocks}
    assert firsts == {tuple(made["image_ids"][0]) for made in documents}


def test_a_document_that_fits_is_left_alone():
    documents = [document(5), document(6)]
    blocks = Blocks(documents, 5, SOT)
    assert len(blocks) == 3
    assert blocks[0] is documents[0]
    assert list(blocks[2]["input_ids"]) == [SOT, 4]
    with pytest.raises(IndexError, match="blocks go from 0 to 2, got 3"):
        blocks[3]


def test_a_long_document_without_sot_is_refused():
    with pytest.raises(ValmError, match="document 1 has 4 tokens, more than a block's 3, and cannot be cut"):
        list(Blocks([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 3, 4]}], 3, SOT))


def test_a_block_has_room_for_a_token_beside_sot():
    with pytest.raises(ValmError, match="at least 2 tokens, SOT and another, got a length of 1"):
        Blocks([document(5)], 1, SOT)
