import shutil

import numpy as np
import pytest
import torch

from tests.valm.training.documents import TOKENIZER, Vectors, documents, new_model, new_trainer
from tests.valm.training.test_train import augmented
from valm.errors import ValmError
from valm.training.collate import Collator
from valm.training.image_dropout import ImageDropout


def blinded(dropout, passes, size):
    """Whether each document has no image, (passes, size)."""
    found = [(dropout[number]["image_ids"] == -1).all() for number in range(passes * size)]
    return np.reshape(found, (passes, size))


def test_each_pass_takes_the_images_of_other_documents():
    made = documents(count=50)
    dropout = ImageDropout(made, 0.3, seed=1)
    found = blinded(dropout, passes=40, size=50)
    assert len(dropout) == 50 and abs(found.mean() - 0.3) < 0.05
    assert np.unique(found, axis=0).shape == np.unique(found, axis=1).shape == (40, 50)
    again, other = (blinded(ImageDropout(made, 0.3, seed), passes=40, size=50) for seed in (1, 2))
    assert (again == found).all() and (other != found).any()
    for number in (3, 17, 1234):
        before, after = made[number % 50], dropout[number]
        assert after["input_ids"] == before["input_ids"]
        hidden = found.flat[number]
        assert (after["image_ids"] == (-1 if hidden else before["image_ids"])).all()


def test_nobody_draws_from_a_global_generator():
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    blinded(ImageDropout(documents(), 0.5, seed=1), passes=3, size=8)
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numpys).all()


@pytest.mark.parametrize("row_length", [None, 40])
def test_images_that_nobody_sees_are_in_no_batch(row_length):
    made = documents()
    for document in made:
        document["image_scores"] = np.where(document["image_ids"] == -1, -np.inf, 0.5).astype(np.float32)
    dropout = ImageDropout(made, 0.5, seed=1)
    hidden = blinded(dropout, passes=1, size=8)[0]
    assert hidden.any() and not hidden.all()
    batch = Collator(TOKENIZER, Vectors(), row_length, scores=True)([dropout[number] for number in range(8)])
    seen = np.concatenate([one["image_ids"].ravel() for one, none in zip(made, hidden, strict=True) if not none])
    assert len(batch["image_pool"]) == len(np.unique(seen[seen != -1]))
    assert ((batch["image_scores"] == -torch.inf) == (batch["image_index"] == -1)).all()
    assert (batch["image_index"] >= 0).sum() == (seen != -1).sum()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The losses of a training of more than two passes."""
    made = new_trainer(tmp_path_factory.mktemp("run"), image_dropout=0.5, max_steps=7)
    made.train()
    return made.losses()


def test_a_resumed_training_drops_the_images_of_the_same_documents(tmp_path, uninterrupted):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7}
    new_trainer(tmp_path, image_dropout=0.5, **saving).train()
    for step in (6, 7):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    resumed = new_trainer(tmp_path, image_dropout=0.5, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.losses() == uninterrupted


def test_workers_drop_the_images_of_the_same_documents(tmp_path, uninterrupted):
    made = new_trainer(tmp_path, image_dropout=0.5, max_steps=7, dataloader_num_workers=2)
    made.train()
    assert made.losses() == uninterrupted


def test_accumulation_drops_the_images_of_the_same_documents(tmp_path):
    """Nor would the number of processes change them: a document's do not depend on its batch."""
    runs = []
    for size in (4, 2, 1):
        model = new_model(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        made = new_trainer(tmp_path, model=model, image_dropout=0.5, **sizes)
        made.train()
        runs.append(made.losses())
    np.testing.assert_allclose(runs[1:], [runs[0]] * 2, rtol=1e-5)


def test_the_trainer_counts_passes(tmp_path, monkeypatch):
    """Where all documents are one batch, only the pass tells its draws apart."""
    read = []
    get = ImageDropout.__getitem__
    monkeypatch.setattr(ImageDropout, "__getitem__", lambda self, number: read.append(number) or get(self, number))
    made = new_trainer(tmp_path, image_dropout=0.5, per_device_train_batch_size=8, max_steps=3)
    made.train()
    assert [sorted(read[first : first + 8]) for first in (0, 8, 16)] == [
        [*range(first, first + 8)] for first in (0, 8, 16)
    ]
    assert sorted(made._order.rows(8, 16)) == list(range(8))  # as errors name them


def test_evaluation_sees_all_images(tmp_path):
    held_out = documents(count=5, seed=1)
    without, with_dropout = (
        new_trainer(tmp_path, eval_dataset=held_out, image_dropout=share).evaluate()["eval_loss"] for share in (0, 0.9)
    )
    assert without == with_dropout


def test_an_augmented_decoder_learns_from_documents_without_images(tmp_path):
    """Packed, and a step in which no token has one too."""
    made = new_trainer(tmp_path, model=augmented(unfreeze="block"), image_dropout=0.9, max_steps=8)
    made.train()
    assert all(np.isfinite(made.losses()))


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (
            new_model,
            {"image_dropout": 1.0},
            r"image_dropout \(--image-dropout\) is 1.0, expected at least 0 and below 1",
        ),
        (new_model, {"image_dropout": -0.1}, r"image_dropout \(--image-dropout\) is -0.1, expected at least 0"),
        (
            lambda: new_model(num_images=0),
            {"kb": None},
            "of a model with images, and this VaLMForCausalLM sees none: d",
        ),
        (augmented, {}, "all of these are frozen: let some train .--unfreeze block or all., or leave"),
        (
            new_model,
            {"train_sampling_strategy": "group_by_length"},
            'documents that have a length and train_sampling_strategy "random"',
        ),
    ],
)
def test_where_it_could_do_nothing_it_is_refused(tmp_path, model, more, message):
    with pytest.raises(ValmError, match=message):
        new_trainer(tmp_path, **({"model": model(), "image_dropout": 0.5} | more))


def test_a_model_that_retrieves_as_it_trains_is_refused(tmp_path):
    model = new_model()
    model.set_retriever(type("Retriever", (), {"k": 3, "dim": 24})())
    with pytest.raises(ValmError, match="retrieves as it trains: leave --image-dropout out"):
        new_trainer(tmp_path, model=model, kb=None, image_dropout=0.5)
