import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tolerance import assert_agree
from tests.valm.models import model_of
from tests.valm.other_tokenizers import gpt2_like
from tests.valm.training.documents import TOKENIZER, Vectors, documents
from valm.errors import ValmError
from valm.training.collate import IGNORED, Collator


def random_documents(lengths, num_images=2, seed=0):
    random = np.random.default_rng(seed)
    made = []
    for length in lengths:
        images = random.integers(0, 12, (length, num_images))
        images[random.random(images.shape) < 0.3] = -1
        ids = random.integers(0, 500, length)
        ids[0] = TOKENIZER.bos_token_id
        made.append({"input_ids": ids, "image_ids": images})
    return made


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.sampled_from([None, 1, 9, 16]), st.integers(0, 99))
def test_every_token_keeps_its_pictures_and_every_picture_comes_once(lengths, row_length, seed):
    made, kb = random_documents(lengths, seed=seed), Vectors()
    batch = Collator(TOKENIZER, kb, row_length, mask=True)(made)
    real = batch["attention_mask"].bool()
    # documents follow one another, row by row
    ids = np.concatenate([document["input_ids"] for document in made])
    assert batch["input_ids"][real].tolist() == ids.tolist()
    images = np.concatenate([document["image_ids"] for document in made])
    index = batch["image_index"][real].numpy()
    assert ((index < 0) == (images == -1)).all()
    assert (batch["image_index"][~real] == -1).all()
    present = index >= 0
    assert np.array_equal(batch["image_pool"].numpy()[index[present]], kb.vectors[images[present]])
    assert len(batch["image_pool"]) == len(np.unique(images[images != -1]))
    if row_length is None:
        assert batch["input_ids"].shape == (len(lengths), max(lengths))
    else:
        assert batch["input_ids"].shape[1] <= max(row_length, max(lengths))
        assert batch["input_ids"].shape[0] <= len(lengths)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.sampled_from([1, 9, 16]))
def test_positions_restart_where_documents_begin(lengths, row_length):
    batch = Collator(TOKENIZER, None, row_length, mask=True)(random_documents(lengths))
    positions, real = batch["position_ids"], batch["attention_mask"].bool()
    assert positions[real].tolist() == [position for length in lengths for position in range(length)]
    assert not positions[~real].any()  # so each token of padding is alone
    assert (batch["labels"][positions == 0] == IGNORED).all()


@pytest.mark.parametrize("row_length", [None, 8])
def test_only_who_asks_gets_a_mask(row_length):
    """With one, transformers would make a mask of all pairs of tokens, and would not look at positions."""
    made, kb = random_documents([3, 4, 6]), Vectors()
    batch = Collator(TOKENIZER, kb, row_length)(made)
    masked = Collator(TOKENIZER, kb, row_length, mask=True)(made)
    assert ("position_ids" in batch) == (row_length is not None)
    assert masked.keys() - batch.keys() == {"attention_mask"}
    assert all(batch[name].equal(masked[name]) for name in batch)


def test_labels_leave_out_padding_and_the_start_of_documents():
    batch = Collator(TOKENIZER, None, row_length=8)(random_documents([3, 4, 6]))
    assert batch["input_ids"].shape == (2, 7)
    learned = batch["labels"] != IGNORED
    assert learned.int().tolist() == [[0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0]]
    assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])
    assert "image_pool" not in batch


def test_a_token_that_begins_and_ends_documents_is_learned_where_it_ends_them():
    tokenizer = gpt2_like()
    end = tokenizer.eos_token_id
    documents = [{"input_ids": [end, 5, 6, end]}, {"input_ids": [end, 7, end]}]
    batch = Collator(tokenizer, None, row_length=8)(documents)
    assert batch["labels"].tolist() == [[IGNORED, 5, 6, end, IGNORED, 7, end]]
    # nor is a first token that is no bos
    assert Collator(TOKENIZER, None)([{"input_ids": [1, 2]}])["labels"].tolist() == [[IGNORED, 2]]
    assert Collator(TOKENIZER, None, 8)([{"input_ids": [1, 2]}] * 2)["labels"].tolist() == [[IGNORED, 2] * 2]


@pytest.mark.filterwarnings("error:a row has")  # none has several documents that the model could not tell apart
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("row_length", [None, 8, 40])
def test_packing_changes_no_loss(row_length, ends):
    """The loss of a batch is that of its documents alone, also where bos ends and pads too."""
    tokenizer, made = TOKENIZER, documents()
    if ends:
        tokenizer = gpt2_like()
        end = tokenizer.eos_token_id
        made = [{"input_ids": [end, 5, 6, end]}, {"input_ids": [end, 7, end]}, {"input_ids": [end, 8]}]
        for document in made:
            document["image_ids"] = np.arange(3 * len(document["input_ids"])).reshape(-1, 3)
    model = model_of(tokenizer)
    rows = Collator(tokenizer, Vectors(), row_length)(made)
    each = [Collator(tokenizer, Vectors())([document]) for document in made]
    lengths = [(batch["labels"] != IGNORED).sum() for batch in each]
    expected = sum(model(**b).loss * n for b, n in zip(each, lengths, strict=True)) / sum(lengths)
    assert_agree(model(**rows).loss, expected)


def test_documents_without_pictures_and_foreign_pictures_are_refused():
    with pytest.raises(ValmError, match="contain no image_ids"):
        Collator(TOKENIZER, Vectors())([{"input_ids": [1, 2]}])
    with pytest.raises(ValmError, match="belong to another knowledge base: image ids go from 0 to 2"):
        Collator(TOKENIZER, Vectors(3))(documents())


@pytest.mark.parametrize("token", [-1, len(TOKENIZER), 2**31 - 1])
def test_tokens_that_the_tokenizer_does_not_have_are_refused(token):
    (document,) = random_documents([3])
    document["input_ids"][1] = token
    with pytest.raises(ValmError, match=rf"token ids from -?\d+ to \d+, but the tokenizer has only {len(TOKENIZER)}"):
        Collator(TOKENIZER, Vectors())([document])
