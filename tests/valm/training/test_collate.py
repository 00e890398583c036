from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.valm.models import tiny_model
from tests.valm.other_tokenizers import gpt2_like
from tests.valm.training.documents import TOKENIZER, Vectors, documents
from valm.errors import ValmError
from valm.model.documents import check_bounds, find_documents
from valm.training.collate import IGNORED, Collator
from valm_kernels import sort_image_slots


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


def test_scores_stay_with_their_images():
    made = random_documents([5, 3, 9])
    for number, document in enumerate(made):
        ids = document["image_ids"]
        document["image_scores"] = np.where(ids == -1, -np.inf, 100 * number + ids).astype(np.float32)
    for row_length in (None, 9):
        batch = Collator(TOKENIZER, Vectors(), row_length, scores=True)(made)
        assert ((batch["image_scores"] == -torch.inf) == (batch["image_index"] < 0)).all()
        real = batch["attention_mask"].bool()
        scores = np.concatenate([document["image_scores"] for document in made])
        assert np.array_equal(batch["image_scores"][real].numpy(), scores)
    assert "image_scores" not in Collator(TOKENIZER, Vectors())(made)
    del made[1]["image_scores"]
    with pytest.raises(ValmError, match="the documents have none: retrieve them again"):
        Collator(TOKENIZER, Vectors(), scores=True)(made)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.sampled_from([None, 1, 9, 16]), st.integers(0, 99))
def test_every_token_keeps_its_pictures_and_every_picture_comes_once(lengths, row_length, seed):
    made, kb = random_documents(lengths, seed=seed), Vectors()
    batch = Collator(TOKENIZER, kb, row_length)(made)
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
    assert batch["image_slots"].equal(sort_image_slots(batch["image_index"], len(batch["image_pool"])))
    if row_length is None:
        assert batch["input_ids"].shape == (len(lengths), max(lengths))
    else:
        assert batch["input_ids"].shape[1] <= max(row_length, max(lengths))
        assert batch["input_ids"].shape[0] <= len(lengths)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.sampled_from([None, 1, 9, 16]))
def test_bounds_are_where_documents_begin(lengths, row_length):
    made = random_documents(lengths)
    batch = Collator(TOKENIZER, None, row_length, bounds=True)(made)
    rows, width = batch["input_ids"].shape
    bounds, real = batch["cu_seqlens"], batch["attention_mask"].flatten().bool()
    assert bounds.dtype == torch.int32 and bounds[-1] == rows * width
    assert [int(real[start:end].sum()) for start, end in pairwise(bounds.tolist())] == lengths
    assert batch["max_seqlen"] == max(end - start for start, end in pairwise(bounds.tolist()))
    begins = (batch["input_ids"] == TOKENIZER.bos_token_id) & batch["attention_mask"].bool()
    check_bounds(bounds, batch["max_seqlen"], find_documents(begins, F.pad(batch["attention_mask"], (1, 0))))


@pytest.mark.parametrize("row_length", [None, 8])
def test_bounds_are_those_of_a_model_that_reads_bos_inside_a_document(row_length):
    tokenizer = gpt2_like()
    end = tokenizer.eos_token_id  # which is bos too
    made = [{"input_ids": [end, 5, 6, end]}, {"input_ids": [end, 7, end]}]
    batch = Collator(tokenizer, None, row_length, bounds=True)(made)
    model = tiny_model(num_images=0, vocab_size=len(tokenizer), bos_token_id=end)
    found = model(batch["input_ids"], batch["attention_mask"]).logits
    bounds = {name: batch[name] for name in ("cu_seqlens", "max_seqlen")}
    assert model(batch["input_ids"], batch["attention_mask"], **bounds).logits.equal(found)


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


@pytest.mark.parametrize("row_length", [None, 40])
def test_packing_changes_no_loss(row_length):
    model = tiny_model(vocab_size=len(TOKENIZER), bos_token_id=TOKENIZER.bos_token_id)
    made, kb = documents(), Vectors()
    rows = Collator(TOKENIZER, kb, row_length)(made)
    each = [Collator(TOKENIZER, kb)([document]) for document in made]
    lengths = [(batch["labels"] != IGNORED).sum() for batch in each]
    expected = sum(model(**b).loss * n for b, n in zip(each, lengths, strict=True)) / sum(lengths)
    torch.testing.assert_close(model(**rows).loss, expected, rtol=1e-5, atol=1e-5)


def test_documents_without_pictures_and_foreign_pictures_are_refused():
    with pytest.raises(ValmError, match="have no image_ids"):
        Collator(TOKENIZER, Vectors())([{"input_ids": [1, 2]}])
    with pytest.raises(ValmError, match="belong to another knowledge base: image ids go from 0 to 2"):
        Collator(TOKENIZER, Vectors(3))(documents())


def test_packing_a_document_that_does_not_begin_with_sot_is_refused():
    with pytest.raises(ValmError, match="does not begin with bos"):
        Collator(TOKENIZER, None, 8)([{"input_ids": [1, 2]}])
    assert Collator(TOKENIZER, None)([{"input_ids": [1, 2]}])["labels"].tolist() == [[IGNORED, 2]]


@pytest.mark.parametrize("token", [-1, len(TOKENIZER), 2**31 - 1])
def test_tokens_that_the_tokenizer_does_not_have_are_refused(token):
    (document,) = random_documents([3])
    document["input_ids"][1] = token
    with pytest.raises(ValmError, match=rf"token ids from -?\d+ to \d+, the tokenizer only {len(TOKENIZER)}"):
        Collator(TOKENIZER, Vectors())([document])
