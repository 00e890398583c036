import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Subset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, modeling_utils

from tests.valm.models import tiny_model
from tests.valm.training.documents import TOKENIZER, Vectors, documents, new_model, new_trainer, trained
from valm.clip.tokenizer import tokenize_documents
from valm.corpus.retrieved import retrieve_corpus
from valm.errors import ValmError
from valm.model.augment import augment
from valm.model.checkpoint import load
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever
from valm.training.callbacks import ProgressBar, show_progress
from valm.training.collate import Collator
from valm.training.train import trainer, training_arguments


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_says_where_documents_begin(tmp_path, packed):
    """By positions, and without a mask, which would be one of all pairs of tokens."""
    made = new_trainer(tmp_path, max_steps=1, row_length=32 if packed else None)
    given, inside = [], []
    made.model.register_forward_pre_hook(lambda _, __, inputs: given.append(inputs), with_kwargs=True)
    block = made.model.transformer.h[0]
    block.register_forward_pre_hook(lambda _, args, inputs: inside.append((args, inputs)), with_kwargs=True)
    made.train()
    (inputs,), ((args, further),) = given, inside
    assert "attention_mask" not in inputs and ("position_ids" in inputs) == packed
    masks = [value for value in (*args, *further.values()) if isinstance(value, torch.Tensor) and value.dim() == 4]
    assert bool(masks) == packed


def test_nothing_is_said_of_padding_that_no_token_sees(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(modeling_utils.logger, "warning_once", said.append)
    trained(tmp_path, model=new_model(pad_token_id=Collator(TOKENIZER, None).pad), max_steps=1)
    assert said == []


def test_the_same_seed_gives_the_same_losses_and_weights(tmp_path):
    runs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        made = trained(tmp_path / name, seed=seed)
        runs.append((made.losses(), made.model.state_dict()))
    assert len(runs[0][0]) == 6
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(runs[0][1][name], weight) for name, weight in runs[1][1].items())


def test_training_learns_and_writes_a_checkpoint_that_gives_the_same_logits(tmp_path, capfd):
    made = new_trainer(tmp_path, max_steps=40)
    show_progress(made, "valm")
    made.train()
    assert np.mean(made.losses()[-5:]) < 0.5 * made.losses()[0]
    shown = capfd.readouterr().err
    assert "valm: 100%" in shown and "loss=" in shown
    made.write(tmp_path, TOKENIZER)
    model = made.model.eval()
    loaded, tokenizer = load(tmp_path)
    ids = tokenizer("the color of the sun is", return_tensors="pt")["input_ids"]
    images = {"image_pool": torch.randn(5, 24), "image_index": torch.randint(-1, 5, (1, ids.shape[1], 3))}
    assert torch.equal(loaded(ids, **images).logits, model(ids, **images).logits)


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_epochs_are_the_trainers_own(tmp_path, strategy):
    made = new_trainer(tmp_path, max_steps=-1, num_train_epochs=2, logging_strategy=strategy)
    assert made.train().global_step == 4  # of 8 documents in threes
    assert len(made.losses()) == (2 if strategy == "epoch" else 4)


@pytest.mark.parametrize(
    "arguments, given, message",
    [
        ({}, {"kb": None}, "this model sees 3 images a token: give a knowledge base"),
        ({"num_images": 0}, {}, "sees no images: train it without"),
        ({"image_dim": 7}, {}, "vectors of dimension 24, but the model's image_dim is 7"),
        ({"num_images": 2}, {}, "the documents have 3 images a token, but the model's num_images is 2"),
        ({}, {"eval_dataset": documents(num_images=2)}, "2 images a token, but the model's num_images is 3"),
        ({}, {"dataset": []}, "no documents"),
        ({}, {"model": tiny_model(vocab_size=5)}, "vocab_size is 5"),
        ({}, {"fsdp": True}, "fsdp divides a model among several GPUs and has no effect on CPUs: leave"),
        ({}, {"lerning_rate": 1}, "do not fit: .* unexpected keyword argument 'lerning_rate'"),
        ({}, {"lr_scheduler_type": "cosin"}, "do not fit: cosin is not a valid SchedulerType"),
        # label smoothing reads the logits of the labels, by their numbers in the whole vocabulary
        (
            {},
            {"label_smoothing_factor": 0.1, "limit_softmax": True},
            r"limit_softmax changes the model's own loss, which label_smoothing_factor .*: leave .*--limit-softmax",
        ),
    ],
)
def test_what_does_not_fit_together_is_named(tmp_path, arguments, given, message):
    with pytest.raises(ValmError, match=message):
        new_trainer(tmp_path, **{"model": new_model(**arguments)} | given)
    assert not any(tmp_path.iterdir())


def test_columns_that_a_trainer_removed_are_named(tmp_path):
    arguments = training_arguments(tmp_path, use_cpu=True, max_steps=1)
    plain = Trainer(new_model(), arguments, train_dataset=documents(), data_collator=Collator(TOKENIZER, Vectors()))
    with pytest.raises(ValmError, match=r"no image_ids.* unless remove_unused_columns=False"):
        plain.train()


def augmented(**arguments):
    return augment(plain_llama(), image_dim=24, num_images=3, logit_bias=0.0, **arguments)


def plain_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(TOKENIZER), num_key_value_heads=2, max_position_embeddings=32, **sizes)
    return LlamaForCausalLM(config)


def test_an_augmented_decoder_trains_what_was_added_and_goes_on(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 0.1}
    model = augmented()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    made = trained(tmp_path, model=model, **saving)
    changed = {name for name, weight in made.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all("image_fusion" in name for name in changed)
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert trained(tmp_path, resume=True, model=augmented(), **saving).losses() == made.losses()
    loaded, _ = load(tmp_path / "checkpoint-4")
    assert all(torch.equal(weight, made.model.state_dict()[name]) for name, weight in loaded.state_dict().items())
    made.write(tmp_path / "model", TOKENIZER)
    assert type(load(tmp_path / "model")[0]).__name__ == "LlamaForCausalLM"
    packed = new_trainer(tmp_path, model=augmented(), row_length=16, use_cache=True)
    assert packed.data_collator.row_length == 16 and not packed.args.use_cache


def test_a_decoder_without_images_is_trained_and_written(tmp_path):
    made = trained(tmp_path / "run", model=plain_llama(), kb=None, max_steps=1)
    made.write(tmp_path / "model", TOKENIZER)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(weight, made.model.state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_a_part_of_a_retrieved_corpus_is_checked_too(tmp_path, clip, make_kb):
    kb, other = make_kb(4), make_kb(5)
    documents = tokenize_documents(["one two", "three"], TOKENIZER)

    def corpus(name, encoder):
        return retrieve_corpus(documents, Retriever(encoder, kb, 3), tmp_path / name, progress=False)

    own, foreign = corpus("own", ContextEncoder(clip, tokenizer=TOKENIZER)), corpus("foreign", ContextEncoder(clip))
    model = new_model(image_dim=kb.dim)
    with pytest.raises(ValmError, match="was read with another tokenizer than the model's"):
        new_trainer(tmp_path / "run", dataset=foreign, kb=kb, model=model)
    for dataset in (own, Subset(own, [0, 1]), Subset(Subset(own, [0, 1]), [1])):
        with pytest.raises(ValmError, match="was retrieved from another knowledge base"):
            new_trainer(tmp_path / "run", dataset=dataset, kb=other, model=model)
        new_trainer(tmp_path / "run", dataset=dataset, kb=kb, model=model)


def test_the_arguments_of_the_user_stay_as_they_are(tmp_path):
    arguments = training_arguments(tmp_path, use_cpu=True)
    made = trainer(new_model(), documents(), Vectors(), tokenizer=TOKENIZER, arguments=arguments)
    assert arguments.remove_unused_columns and not made.args.remove_unused_columns
    assert made.args.accelerator_config.dispatch_batches is False
    assert arguments.accelerator_config.dispatch_batches is None


def test_a_resumed_training_follows_the_schedule_of_its_own_steps(tmp_path):
    def rates(folder, steps, resume=None):
        made = trained(folder, resume=resume, max_steps=steps, save_strategy="steps", save_steps=3)
        return [entry["learning_rate"] for entry in made.state.log_history if "learning_rate" in entry]

    begun, short = rates(tmp_path / "begun", 6), rates(tmp_path / "more", 3)
    more = rates(tmp_path / "more", 6, resume=True)
    # its first step has the rate that is in the checkpoint
    assert more[:3] == short and more[4:] == begun[4:]


@pytest.mark.parametrize(("shown", "first", "drawn"), [(True, True, True), (True, False, False), (False, True, False)])
def test_one_process_draws_the_bar_if_any(monkeypatch, shown, first, drawn):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    bar = ProgressBar("a training", shown)
    state = SimpleNamespace(is_world_process_zero=first, max_steps=3, global_step=0)
    bar.on_train_begin(None, state, None)
    assert bar.training_bar.disable != drawn
    bar.training_bar.close()
