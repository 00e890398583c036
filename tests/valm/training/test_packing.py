"""Training on packed rows: any decoder that keeps documents apart has the losses of padded ones."""

import logging

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.checks.families import tiny
from tests.tolerance import assert_agree
from tests.valm.training.documents import TOKENIZER, Vectors, documents, trained
from tests.valm.training.test_train import plain_llama
from valm.model.augment import augment
from valm.model.probe import keeps_apart


def plain_gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": len(TOKENIZER), "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def losses(folder, model, row_length, kb):
    made = documents()
    for document in made:  # without bos
        document["input_ids"], document["image_ids"] = document["input_ids"][1:], document["image_ids"][1:]
    data = {"dataset": made, "eval_dataset": made[:3], "kb": kb, "row_length": row_length}
    training = trained(folder, model=model, **data, max_steps=4, per_device_train_batch_size=4)
    return [*training.losses(), training.evaluate()["eval_loss"]], training.data_collator


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("decoder", [plain_gpt2, plain_llama])
def test_a_packed_training_has_the_losses_of_a_padded_one(decoder, images, tmp_path):
    """Of a decoder with images, and of one of transformers as it is; documents that begin with no bos."""
    found = {}
    for row_length in (None, 24):
        model, kb = decoder(), None
        if images:
            model, kb = augment(model, Vectors.dim, 3, logit_bias=0.0).requires_grad_(True), Vectors()
        found[row_length], collator = losses(tmp_path / str(row_length), model, row_length, kb)
        assert collator.row_length == row_length
    assert_agree(found[24], found[None])


def test_a_family_that_mixes_documents_is_padded():
    """Jamba's layers without attention have a state that goes on."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        families = ("jamba", "opt", "gpt_oss", "llama", "gemma2", "gemma3_text", "gpt2")
        found = {family: tiny(family).to(dtype) for family in families}
        apart = [family for family, model in found.items() if keeps_apart(model, model.forward)]
        assert apart == ["llama", "gemma2", "gemma3_text", "gpt2"], dtype


def test_the_log_says_who_is_padded(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("valm.training.train.keeps_apart", lambda model, forward: False)
    with caplog.at_level(logging.WARNING):
        _, collator = losses(tmp_path, plain_llama(), 24, None)
    assert collator.row_length is None
    assert "LlamaForCausalLM does not keep documents apart by their positions" in caplog.text
