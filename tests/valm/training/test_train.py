import numpy as np
import pytest
import torch

from tests.valm.models import tiny_config
from tests.valm.training.documents import TOKENIZER, Vectors, documents, new_model, new_trainer
from valm.checkpoint import load_checkpoint
from valm.errors import ValmError
from valm.model import VaLMForCausalLM
from valm.training.callbacks import show_progress
from valm.training.train import training_arguments


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
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        made = new_trainer(tmp_path / name, seed=seed)
        made.train()
        runs.append((made.losses(), made.model.state_dict()))
    assert len(runs[0][0]) == 6
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(runs[0][1][name], weight) for name, weight in runs[1][1].items())


def test_gpt2_and_valm_see_the_same_documents_in_the_same_order(tmp_path):
    read = []
    for model, kb in ((new_model(), Vectors()), (new_model(num_images=0), None)):
        dataset = Recorded(documents())
        new_trainer(tmp_path, model=model, kb=kb, dataset=dataset).train()
        read.append(dataset.read[-18:])
    assert read[0] == read[1]
    assert sorted(read[0][:8]) == list(range(8))  # every document once before any comes again
    assert read[0][:8] != read[0][8:16]


def test_training_learns_and_writes_a_checkpoint_that_gives_the_same_logits(tmp_path, capfd):
    made = new_trainer(tmp_path, max_steps=40)
    show_progress(made, "valm")
    made.train()
    assert np.mean(made.losses()[-5:]) < 0.5 * made.losses()[0]
    shown = capfd.readouterr().err
    assert "valm: 100%" in shown and "loss=" in shown
    made.write(tmp_path, TOKENIZER)
    model = made.model.eval()
    loaded, tokenizer = load_checkpoint(tmp_path)
    ids = tokenizer("the color of the sun is", return_tensors="pt")["input_ids"]
    pool, index = torch.randn(5, 24), torch.randint(-1, 5, (1, ids.shape[1], 3))
    assert torch.equal(
        loaded(ids, image_pool=pool, image_index=index).logits, model(ids, image_pool=pool, image_index=index).logits
    )


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_epochs_are_the_trainers_own(tmp_path, strategy):
    made = new_trainer(tmp_path, max_steps=-1, num_train_epochs=2, logging_strategy=strategy)
    assert made.train().global_step == 4  # of 8 documents in threes
    assert len(made.losses()) == (2 if strategy == "epoch" else 4)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulation_changes_no_loss_and_no_weight(tmp_path, accumulation):
    """Documents of unequal length: a mean over batches would weigh the tokens of short ones more."""
    unequal = documents()
    for number, document in enumerate(unequal):
        for name, values in document.items():
            document[name] = values[: 3 + number]
    runs = []
    for steps in (1, accumulation):
        model = new_model(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        sizes = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
        made = new_trainer(tmp_path, model=model, dataset=unequal, max_steps=10, **sizes)
        made.train()
        runs.append(made.losses())
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5)


@pytest.mark.parametrize(
    "arguments, kb, message",
    [
        ({}, None, "this model sees 3 images a token: give a knowledge base"),
        ({"num_images": 0}, Vectors(), "sees no images: train it without"),
        ({"image_dim": 7}, Vectors(), "vectors of dimension 24, but the model's image_dim is 7"),
        ({"num_images": 2}, Vectors(), "the documents have 3 images a token, but the model's num_images is 2"),
    ],
)
def test_what_does_not_fit_together_is_named(tmp_path, arguments, kb, message):
    with pytest.raises(ValmError, match=message):
        new_trainer(tmp_path, model=new_model(**arguments), kb=kb)
    assert not any(tmp_path.iterdir())


def test_no_documents_and_a_foreign_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValmError, match="no documents"):
        new_trainer(tmp_path, dataset=[])
    with pytest.raises(ValmError, match="vocab_size is 5"):
        new_trainer(tmp_path, model=VaLMForCausalLM(tiny_config(vocab_size=5)))


def test_arguments_that_cannot_be_are_one_sentence(tmp_path):
    with pytest.raises(ValmError, match=r"no field 'lerning_rate', did you mean learning_rate\?"):
        training_arguments(tmp_path, lerning_rate=1)
    with pytest.raises(ValmError, match="do not fit: cosin is not a valid SchedulerType"):
        training_arguments(tmp_path, lr_scheduler_type="cosin")


def test_the_arguments_of_the_user_stay_as_they_are(tmp_path):
    arguments = training_arguments(tmp_path, use_cpu=True)
    made = new_trainer(tmp_path)
    assert arguments.remove_unused_columns and not made.args.remove_unused_columns
    assert made.args.accelerator_config.dispatch_batches is False
    assert arguments.accelerator_config.dispatch_batches is None
