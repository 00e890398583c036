"""Documents are cut, exchanged, held out and divided as they say, and the trainings that read them too."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset

from tests.tolerance import assert_agree
from tests.valm.training.documents import TOKENIZER, Vectors, documents, new_model, new_trainer, trained
from tests.valm.training.process import unequal_documents
from tests.valm.training.test_train import augmented
from valm.errors import ValmError
from valm.retrieval.min_score import cut
from valm.training.collate import Collator
from valm.training.data import TWINS, DocumentView, evened, hold_out, twin, with_min_score
from valm.training.data import blocks as cut_up
from valm.training.image_trainer import FUSION_NAME


@pytest.mark.parametrize("kind", TWINS)
def test_a_twin_sees_the_same_tokens_in_the_same_order(kind):
    made = documents(count=20)
    order = np.random.default_rng(0).permutation(20)
    blocks = [cut_up(data, 5, TOKENIZER.bos_token_id) for data in (made, twin(kind, made, 40, seed=3))]
    assert len(blocks[0]) == len(blocks[1]) > 20
    for index in order:
        assert list(blocks[0][index]["input_ids"]) == list(blocks[1][index]["input_ids"])
        assert ("image_ids" in blocks[1][index]) == (kind in ("random", "shuffled"))


def test_random_images_are_as_many_different_ones_of_the_knowledge_base():
    made = documents(num_images=3, count=200)
    drawn = twin("random", made, 40, seed=1)
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


def test_all_images_can_be_drawn():
    """K of K: each row is a permutation."""
    images = np.zeros((50, 4), np.int64)
    (found,) = twin("random", [{"input_ids": [0] * 50, "image_ids": images}], 4, seed=0)
    assert all(sorted(row) == [0, 1, 2, 3] for row in found["image_ids"].tolist())
    assert len(np.unique(found["image_ids"], axis=0)) > 10


def test_shuffled_images_are_those_of_another_token_each():
    # images that name their token
    lengths, made, token = [4, 1, 7, 3], [], 0
    for length in lengths:
        ids = np.arange(token, token + length)
        made.append({"input_ids": ids, "image_ids": np.stack([ids, ids + 100], axis=1)})
        token += length
    shuffled = twin("shuffled", made, 40, seed=2)
    tokens = np.concatenate([document["input_ids"] for document in shuffled])
    images = np.concatenate([document["image_ids"] for document in shuffled])
    assert (tokens == np.arange(15)).all()
    assert sorted(images[:, 0]) == list(range(15)) and (images[:, 1] == images[:, 0] + 100).all()
    assert (images[:, 0] != tokens).all()


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_a_seed_decides_the_images_whoever_reads_them(kind):
    made = [{**document, "image_scores": np.ones(document["image_ids"].shape, np.float32)} for document in documents()]

    def images(data, order):
        assert all(set(data[index]) == {"input_ids", "image_ids"} for index in order)  # exchanged ones have no scores
        found = {index: data[index]["image_ids"].tolist() for index in order}
        return [found[index] for index in range(8)]

    data = twin(kind, made, 40, seed=5)
    forth = images(data, range(8))
    assert images(pickle.loads(pickle.dumps(data)), range(7, -1, -1)) == forth
    assert images(twin(kind, made, 40, seed=6), range(8)) != forth


def test_wrong_arguments_are_named():
    with pytest.raises(ValmError, match="twin must be one of text, random, blind, shuffled, got 'blond'"):
        twin("blond", documents(), 40, 0)
    with pytest.raises(ValmError, match="at least 2 tokens, SOT and another, got a length of 1"):
        cut_up([document(5)], 1, SOT)
    for count, fraction, message in ((9, 0.0, "above 0"), (9, 1.0, "below 1"), (1, 0.5, "at least 2, got 1: give a")):
        with pytest.raises(ValmError, match=message):
            hold_out(DOCUMENTS[:count], fraction, 0)


SOT = 99


def document(length, seed=0):
    images = np.random.default_rng(seed).integers(0, 50, (length, 2))
    return {"input_ids": [SOT, *range(length - 1)], "image_ids": images}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(2, 12))
def test_every_token_is_in_one_block_with_the_pictures_of_its_document(lengths, size):
    documents = [document(length, seed) for seed, length in enumerate(lengths)]
    data = cut_up(documents, size, SOT)
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


def test_evened_documents_have_lengths():
    assert evened([document(length) for length in (3, 4, 5, 6, 7)], 4).lengths().tolist()[:5] == [3, 4, 5, 6, 7]


def test_a_document_that_fits_is_left_alone():
    documents = [document(5), document(6)]
    blocks = cut_up(documents, 5, SOT)
    assert len(blocks) == 3
    assert blocks[0] is documents[0]
    assert list(blocks[2]["input_ids"]) == [SOT, 4]
    with pytest.raises(IndexError, match="documents go from 0 to 2, got 3"):
        blocks[3]


def test_a_long_document_without_sot_is_refused():
    with pytest.raises(ValmError, match="document 1 has 4 tokens, more than a block's 3, and cannot be cut"):
        list(cut_up([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 3, 4]}], 3, SOT))


DOCUMENTS = [{"input_ids": list(range(number + 1))} for number in range(40)]


@given(st.integers(2, 40), st.floats(0.001, 0.999), st.integers(0, 9))
def test_every_document_is_trained_on_or_held_out(count, fraction, seed):
    kept, held = hold_out(DOCUMENTS[:count], fraction, seed)
    lengths = [len(part[number]["input_ids"]) for part in (kept, held) for number in range(len(part))]
    assert sorted(lengths) == list(range(1, count + 1))
    assert len(held) == min(count - 1, max(1, round(fraction * count)))
    assert kept.lengths().tolist() == [len(kept[i]["input_ids"]) for i in range(len(kept))]
    assert np.array_equal(hold_out(DOCUMENTS[:count], fraction, seed)[1].numbers, held.numbers)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.floats(0.001, 0.999), st.integers(0, 9))
def test_the_texts_of_an_image_are_held_out_together(groups, fraction, seed):
    groups = np.array(groups)
    documents = DocumentView(DOCUMENTS[: len(groups)], of_images=groups)
    if groups.all() and len({*groups.tolist()}) == 1:
        with pytest.raises(ValmError, match=f"at least 2 of more than one image, got {len(groups)}"):
            hold_out(documents, fraction, seed)
        return
    kept, held = hold_out(documents, fraction, seed)
    assert sorted([*kept.numbers, *held.numbers]) == list(range(len(groups)))
    assert not {*kept.groups().tolist()} & {*held.groups().tolist()} - {0}
    largest = max(np.bincount(groups)[1:], default=1)
    wanted = max(1, round(fraction * len(groups)))
    assert 0 < len(held) < wanted + largest
    assert len(held) >= wanted or len({*kept.groups().tolist()} - {0}) + (kept.groups() == 0).sum() == 1


@pytest.fixture
def scored():
    """Documents with scores; one is exactly at 0.5."""
    random = np.random.default_rng(0)
    made = []
    for document in documents():
        scores = random.uniform(0, 0.7, document["image_ids"].shape).astype(np.float32)
        scores[0] = 0.5
        scores[document["image_ids"] < 0] = -np.inf
        made.append(document | {"image_scores": scores})
    return made


def test_all_images_of_a_token_or_none(scored):
    found = with_min_score(scored, 0.5)
    assert len(found) == len(scored) and found.lengths().tolist() == [len(one["input_ids"]) for one in scored]
    kept = 0
    for document, one in zip(scored, found, strict=True):
        keep = (document["image_scores"] >= 0.5).any(-1)
        kept += keep.mean() / len(scored)
        assert np.array_equal(one["image_ids"][keep], document["image_ids"][keep])
        assert (one["image_ids"][~keep] == -1).all() and (one["image_scores"][~keep] == -np.inf).all()
        assert one["image_ids"].dtype == np.int64 and one["image_scores"].dtype == np.float32
        assert keep[0] == (document["image_ids"][0] >= 0).any()
    assert 0.2 < kept < 0.8


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_a_twin_has_images_where_the_model_has(scored, kind):
    seen = with_min_score(scored, 0.5)
    made = twin(kind, seen, 40, seed=1)
    for document, one in zip(seen, made, strict=True):
        assert np.array_equal((document["image_ids"] >= 0).any(-1), (one["image_ids"] >= 0).any(-1))
        assert not np.array_equal(document["image_ids"], one["image_ids"])
    for cut_once in (made, Subset(made, [1, 0])):
        assert with_min_score(cut_once, 0.5) is cut_once
    for other in (0.6, None):
        with pytest.raises(ValmError, match=rf"the documents have the min_score 0\.5, but the model's is {other}"):
            with_min_score(made, other)


def test_the_trainer_cuts_by_the_models_min_score(scored, tmp_path):
    def weights(model, dataset):
        return trained(tmp_path, model=model, dataset=dataset, max_steps=2).model.state_dict()

    cut = weights(new_model(min_score=0.5), scored)
    given = weights(new_model(), list(with_min_score(scored, 0.5)))
    uncut = weights(new_model(), scored)
    assert all(torch.equal(cut[name], given[name]) for name in cut)
    assert not all(torch.equal(cut[name], uncut[name]) for name in cut)


def test_a_min_score_that_hides_every_image_is_said(scored):
    with pytest.warns(UserWarning, match=r"at min_score 7\.0 no token of the first 8 documents .* score is 0\.6\d\d"):
        with_min_score(scored, 7.0)


@pytest.mark.filterwarnings("ignore:at min_score 2.0")
@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_without_any_image_has_gradients_of_all_parameters(scored, tmp_path, frozen):
    """Otherwise one whose other parameters are frozen would have nothing to train, and processes would not agree."""
    model = augmented(min_score=2.0) if frozen else augmented(min_score=2.0).requires_grad_(True)
    made = new_trainer(tmp_path, model=model, dataset=scored, weight_decay=0)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    batch = made.data_collator([made.train_dataset[index] for index in range(3)])
    assert len(batch["image_pool"]) == 0
    made.model.train()
    made.model(**batch).loss.backward()
    trains = {name: tensor for name, tensor in made.model.named_parameters() if tensor.requires_grad}
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in trains.values())
    seen = {name for name, tensor in trains.items() if tensor.grad.any()}
    assert not any(FUSION_NAME in name for name in seen) and bool(seen) != frozen
    made.model.zero_grad()
    made.train()
    after = made.model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} <= seen


def test_a_number_of_numpys_cuts_as_one_of_pythons():
    """NumPy compares its own 0.7 with float32 scores in float64, where a score that was rounded to 0.7 is below."""
    ids, scores = torch.tensor([[3]]), torch.tensor([[0.7]])
    for number in (0.7, np.float64(0.7), np.float32(0.7)):
        assert cut(ids, scores, number)[0].equal(ids)


def test_what_a_trainer_is_given_to_evaluate_is_what_its_own_documents_are(scored, tmp_path):
    """Cut by the min_score, and into blocks that the model can read."""
    long = [{name: np.concatenate([values] * 9) for name, values in document.items()} for document in scored]
    own = new_trainer(tmp_path, model=new_model(min_score=0.5), dataset=scored, eval_dataset=long)
    other = new_trainer(tmp_path, model=new_model(min_score=0.5), dataset=scored, eval_dataset=scored)
    expected = own.evaluate()["eval_loss"]
    assert own.evaluate(own.eval_dataset)["eval_loss"] == other.evaluate(long)["eval_loss"] == expected
    assert other.predict(long).metrics["test_loss"] == expected
    uncut = new_trainer(tmp_path, dataset=scored, eval_dataset=list(with_min_score(scored, 0.5)))
    assert other.evaluate()["eval_loss"] == uncut.evaluate()["eval_loss"] != uncut.evaluate(scored)["eval_loss"]
    with pytest.raises(ValmError, match="contains no retrieval scores, which a model with a min_score needs"):
        other.evaluate(documents())


def test_documents_without_scores_are_refused_before_the_training(tmp_path):
    with pytest.raises(ValmError, match="contains no retrieval scores, which a model with a min_score needs"):
        new_trainer(tmp_path, model=new_model(min_score=0.5))
    with pytest.raises(ValmError, match="min_score cannot be applied to a streamed dataset"):
        with_min_score(iter(documents()), 0.5)
    streamed = iter(documents())
    assert with_min_score(streamed, None) is streamed


def test_accumulation_changes_no_loss(tmp_path):
    """Of documents of unequal length a mean over batches would weigh the tokens of short ones more."""
    runs = []
    for size in (4, 2, 1):
        model = new_model(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        made = trained(tmp_path, model=model, dataset=unequal_documents(8), **sizes)
        runs.append(made.losses())
    assert_agree(runs[1:], [runs[0]] * 2)
