import errno
import os

import numpy as np
import pytest
import torch
from torch.optim import AdamW
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.tolerance import assert_agree
from tests.valm.model.decoders import IMAGES, SMALL, VOCAB, augmented, tiny_gpt2, tiny_llama
from tests.valm.models import BOS, tiny_model
from tests.valm.training.documents import Vectors, trained
from valm.errors import ValmError
from valm.model.augment import fusion_layer
from valm.model.probe import decoder_layers
from valm.training.cache_below import BATCH_TOKENS, FUSION_INPUT, cache_below
from valm.training.collate import Collator


class Tokenizer:
    """What the collator needs of one."""

    bos_token_id, eos_token_id, pad_token_id, model_max_length = BOS, 2, 0, 128

    def __len__(self):
        return VOCAB


def documents(count=12, images=IMAGES):
    random = np.random.default_rng(0)
    made = []
    for length in random.integers(2, 20, count):
        ids = np.r_[BOS, random.integers(3, BOS, length - 1)]
        found = random.integers(0, 40, (length, images))
        found[random.random(found.shape) < 0.2] = -1
        made.append({"input_ids": ids, "image_ids": found})
    return made


def frozen_valm(**arguments):
    """A VaLM of which the fusion block and what is above it train; its embeddings are tied to its head, and frozen."""
    model = tiny_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **arguments).requires_grad_(False)
    for block in model.transformer.h[model.fusion_options.layer :]:
        block.requires_grad_(True)
    return model


def gemma(seed=0):
    """Scales its embeddings, and its layers differ in their masks."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 4}
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, **sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


MODELS = {
    "llama": augmented,
    "gpt2": lambda: augmented(lambda seed: tiny_gpt2(seed, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "gemma": lambda: augmented(gemma),
    "valm": frozen_valm,
}


def train(model, data, steps=6, row_length=None, checkpointing=False):
    """The losses of some steps in a fixed order."""
    collate = Collator(Tokenizer(), Vectors(), row_length)
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    losses = []
    for step in range(steps):
        rows = np.random.default_rng(step).permutation(len(data))[:4]
        loss = model(**collate([data[row] for row in rows])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_the_losses_are_those_without_the_cache(tmp_path, name):
    """To rounding: a document is computed beside others of its length, so products are summed in another order."""
    data = documents()
    model = MODELS[name]()
    expected = train(model, data)
    cached = MODELS[name]()
    below = cache_below(cached, data, tmp_path, progress=False)
    calls = []
    for layer in decoder_layers(cached)[: fusion_layer(cached)]:
        layer.register_forward_hook(lambda module, args, output: calls.append(output))
    losses = train(cached, below)
    assert_agree(losses, expected)
    assert abs(losses[0] - losses[-1]) > 1e-3
    # the layers below were skipped: what they returned is what was cached, whole
    assert calls and all(output[0].data_ptr() == calls[0][0].data_ptr() for output in calls[: len(calls) // 6])


@pytest.mark.parametrize(
    "name, options",
    [*((name, {"row_length": 32}) for name in ("llama", "gpt2", "valm")), ("llama", {"checkpointing": True})],
)
def test_in_packed_rows_and_with_gradient_checkpointing(tmp_path, name, options):
    data, cached = documents(), MODELS[name]()
    below = cache_below(cached, data, tmp_path, progress=False)
    expected = train(MODELS[name](), data, row_length=options.get("row_length"))
    assert_agree(train(cached, below, **options), expected)


def test_computed_in_the_same_batches_the_losses_are_equal_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("valm.training.cache_below.BATCH_TOKENS", 1)  # one document at a time
    data = documents()
    model, cached = augmented(), augmented()
    below = cache_below(cached, data, tmp_path, progress=False)
    collate = Collator(Tokenizer(), Vectors())
    for number, document in enumerate(data):
        assert model(**collate([document])).loss.item() == cached(**collate([below[number]])).loss.item()


def test_layers_below_are_not_run(tmp_path):
    model = augmented()
    below = cache_below(model, documents(), tmp_path, progress=False)
    batch = Collator(Tokenizer(), Vectors())([below[0], below[1]])
    expected = model(**batch).logits
    with torch.no_grad():
        for parameter in decoder_layers(model)[: fusion_layer(model)].parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(model(**batch).logits, expected)
    # and without hidden states they are
    assert model(**{name: value for name, value in batch.items() if name != FUSION_INPUT}).logits.isnan().all()
    model._fusion_input.remove()
    assert model(**batch).logits.isnan().all()


def test_bfloat16(tmp_path):
    model = augmented().to(torch.bfloat16)
    data = documents()
    below = cache_below(model, data, tmp_path, progress=False)
    collate = Collator(Tokenizer(), Vectors())
    assert collate([below[0]])[FUSION_INPUT].dtype == torch.bfloat16
    found, expected = model(**collate([below[0]])).logits, model(**collate([data[0]])).logits
    assert_agree(found, expected)


def test_another_layer_takes_the_place_of_the_first(tmp_path):
    """Of a plain decoder, as the twin without images of an augmented model is."""
    data, collate = documents(), Collator(Tokenizer(), None)
    model = tiny_llama().requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    expected = [model(**collate([document])).loss.item() for document in data]
    for layer in (-1, -2):
        below = cache_below(model, data, tmp_path, layer=layer, progress=False)
        found = [model(**collate([below[row]])).loss.item() for row in range(len(data))]
        assert_agree(found, expected)
    model._fusion_input.remove()
    cache_below(model, data, tmp_path, layer=-2, progress=False)


def test_what_is_there_is_used_and_only_for_what_it_is_of(tmp_path, monkeypatch):
    data = documents()
    first = cache_below(augmented(), data, tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    trained = augmented()
    train(trained, data, steps=1)  # above the cache only
    trained.config.use_cache, trained.config.pad_token_id = False, 3  # as a Trainer leaves them
    again = cache_below(trained, data, tmp_path, progress=False)
    assert [*tmp_path.iterdir()] == [file] and file.stat().st_mtime_ns == written
    assert np.array_equal(first[3][FUSION_INPUT], again[3][FUSION_INPUT])
    cache_below(augmented(seed=1), data, tmp_path, progress=False)  # other weights
    cache_below(augmented(), data[1:], tmp_path, progress=False)  # other tokens
    cache_below(augmented(), data[::-1], tmp_path, progress=False)
    cache_below(augmented().half(), data, tmp_path, progress=False)
    assert len([*tmp_path.iterdir()]) == 5
    assert sum(map(len, documents())) < BATCH_TOKENS


def test_a_file_that_was_cut_is_not_trained_on(tmp_path):
    cache_below(augmented(), documents(), tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValmError, match=r"below-.*\.npy is damaged"):
        cache_below(augmented(), documents(), tmp_path, progress=False)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: augmented().requires_grad_(True), r"embed_tokens\.weight is below layer 1 and trains"),
        (lambda: tiny_model(attn_pdrop=0.0), r"wte\.weight is below layer 1 and trains"),
        (lambda: augmented(tiny_gpt2), r"dropout is active below layer 1"),
        (lambda: augmented(layer=0), r"nothing below it to be cached"),
        (lambda: tiny_llama(), r"LlamaForCausalLM has no fusion layer: give a layer"),
    ],
)
def test_models_that_cannot_be_cached_are_refused(tmp_path, make, message):
    model = make()
    with pytest.raises(ValmError, match=message):
        cache_below(model, documents(), tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists()
    assert not model._forward_pre_hooks


def test_no_documents_and_a_full_disk(tmp_path, monkeypatch):
    with pytest.raises(ValmError, match="there are no documents"):
        cache_below(augmented(), [], tmp_path, progress=False)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left.*below-[0-9a-f]+\.npy"):
        cache_below(augmented(), documents(), tmp_path, progress=False)
    assert not any(tmp_path.iterdir())


def test_a_trainer_with_the_cache(tmp_path):
    """Trains and evaluates from the fusion layer on, with the losses it has without."""
    runs = []
    data = documents()
    given = {"dataset": data, "eval_dataset": data[:5], "tokenizer": Tokenizer(), "max_steps": 4, "learning_rate": 1e-2}
    for folder in (None, tmp_path / "cache"):
        made = trained(tmp_path / "out", model=augmented(), cache_below=folder, **given)
        runs.append([*made.losses(), made.evaluate()["eval_loss"]])
    assert len(runs[0]) == 5 and abs(runs[0][0] - runs[0][3]) > 1e-3
    assert_agree(runs[0], runs[1])
    assert len([*(tmp_path / "cache").iterdir()]) == 2
    assert all(FUSION_INPUT in documents[0] for documents in (made.train_dataset, made.eval_dataset))
