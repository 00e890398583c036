import numpy as np
import pytest
import torch

from tests.valm.models import tiny_config
from tests.valm.training.documents import TOKENIZER, Vectors, documents
from valm.checkpoint import load_checkpoint
from valm.errors import ValmError
from valm.model import VaLMForCausalLM
from valm.training.train import train

SETTINGS = {"tokenizer": TOKENIZER, "steps": 6, "batch_size": 3, "lr": 3e-3, "progress": None}


def new_model(**arguments):
    torch.manual_seed(0)
    ids = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    return VaLMForCausalLM(tiny_config(vocab_size=len(TOKENIZER), **ids, **arguments))


class Recorded(list):
    """A dataset that remembers what was read."""

    def __init__(self, items):
        super().__init__(items)
        self.read = []

    def __getitem__(self, i):
        self.read.append(i)
        return super().__getitem__(i)


def test_the_same_seed_gives_the_same_losses_and_weights(tmp_path):
    runs = []
    for name in ("a", "b"):
        model = new_model()
        losses = train(model, documents(), Vectors(), tmp_path / name, **SETTINGS, seed=3)
        runs.append((losses, model.state_dict()))
    assert len(runs[0][0]) == 6
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], weight) for name, weight in runs[1][1].items())
    assert runs[0][0] != train(new_model(), documents(), Vectors(), tmp_path / "c", **SETTINGS, seed=4)


def test_gpt2_and_valm_see_the_same_documents_in_the_same_order(tmp_path):
    read = []
    for model, kb in ((new_model(), Vectors()), (new_model(num_images=0), None)):
        dataset = Recorded(documents())
        train(model, dataset, kb, tmp_path, **SETTINGS)
        read.append(dataset.read[-18:])
    assert read[0] == read[1]
    assert sorted(read[0][:8]) == list(range(8))  # an epoch has every document once
    assert read[0][:8] != read[0][8:16]


def test_training_learns_and_writes_a_checkpoint_that_gives_the_same_logits(tmp_path, capfd):
    model = new_model()
    losses = train(model, documents(), Vectors(), tmp_path, **(SETTINGS | {"steps": 40, "progress": "valm"}))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert not model.training
    assert "valm: 100%" in capfd.readouterr().err
    loaded, tokenizer = load_checkpoint(tmp_path)
    ids = tokenizer("the color of the sun is", return_tensors="pt")["input_ids"]
    pool, index = torch.randn(5, 24), torch.randint(-1, 5, (1, ids.shape[1], 3))
    assert torch.equal(
        loaded(ids, image_pool=pool, image_index=index).logits, model(ids, image_pool=pool, image_index=index).logits
    )


@pytest.mark.parametrize(
    "arguments, kb, message",
    [
        ({}, None, "this model sees 3 pictures a token: give a knowledge base"),
        ({"num_images": 0}, Vectors(), "sees no pictures: train it without"),
        ({"image_dim": 7}, Vectors(), "vectors of dimension 24, but the model's image_dim is 7"),
        ({"num_images": 2}, Vectors(), "the documents have 3 pictures a token, but the model's num_images is 2"),
    ],
)
def test_what_does_not_fit_together_is_named(tmp_path, arguments, kb, message):
    with pytest.raises(ValmError, match=message):
        train(new_model(**arguments), documents(), kb, tmp_path, **SETTINGS)
    assert not any(tmp_path.iterdir())


def test_no_documents_and_a_foreign_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValmError, match="no documents"):
        train(new_model(), [], Vectors(), tmp_path, **SETTINGS)
    model = VaLMForCausalLM(tiny_config(vocab_size=5))
    with pytest.raises(ValmError, match="vocab_size is 5"):
        train(model, documents(), Vectors(), tmp_path, **SETTINGS)
