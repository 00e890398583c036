"""Training on packed rows: any decoder that keeps documents apart has the losses of padded ones."""

import logging

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.checks.families import tiny
from tests.tolerance import assert_agree
from tests.valm.training.documents import TOKENIZER, Vectors, documents
from valm.model.augment import augment
from valm.model.probe import keeps_apart
from valm.training.train import trainer, training_arguments

SIZES = {"vocab_size": len(TOKENIZER), "pad_token_id": TOKENIZER.eos_token_id}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def decoder(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**SIZES, **GPT2))
    return LlamaForCausalLM(LlamaConfig(**SIZES, **LLAMA, max_position_embeddings=64))


def losses(folder, model, row_length, kb):
    fields = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1}
    fields |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    made = documents()
    for document in made:  # without bos
        document["input_ids"], document["image_ids"] = document["input_ids"][1:], document["image_ids"][1:]
    arguments = training_arguments(folder, **fields)
    options = {"tokenizer": TOKENIZER, "eval_dataset": made[:3], "row_length": row_length}
    training = trainer(model, made, kb, arguments=arguments, **options)
    training.train()
    return [*training.losses(), training.evaluate()["eval_loss"]], training.data_collator


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_packed_training_has_the_losses_of_a_padded_one(kind, images, tmp_path):
    """Of a decoder with images, and of one of transformers as it is; documents that begin with no bos."""
    found = {}
    for row_length in (None, 24):
        model = decoder(kind)
        if images:
            model = augment(model, Vectors.dim, 3, logit_bias=0.0, unfreeze="all")
        found[row_length], collator = losses(
            tmp_path / str(row_length), model, row_length, Vectors() if images else None
        )
        assert collator.row_length == row_length
    assert_agree(found[24], found[None])


def test_a_family_that_mixes_documents_is_padded(tmp_path, caplog):
    """Jamba's layers without attention have a state that goes on."""
    for dtype in (torch.float32, torch.bfloat16):
        found = {
            family: tiny(family).to(dtype) for family in ("jamba", "opt", "gpt_oss", "llama", "gemma3_text", "gpt2")
        }
        apart = [family for family, model in found.items() if keeps_apart(model, model.forward)]
        assert apart == ["llama", "gemma3_text", "gpt2"], dtype


def test_the_log_says_who_is_padded(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("valm.training.train.keeps_apart", lambda model, forward: False)
    with caplog.at_level(logging.WARNING):
        _, collator = losses(tmp_path, decoder("llama"), 24, None)
    assert collator.row_length is None
    assert "LlamaForCausalLM does not keep documents apart by their positions" in caplog.text
