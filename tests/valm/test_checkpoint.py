import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.valm.models import tiny_model
from valm import checkpoint
from valm.checkpoint import load_checkpoint, save_checkpoint
from valm.errors import ValmError
from valm.tokenizer import clip_tokenizer, prune_tokenizer

TOKENIZER = prune_tokenizer(clip_tokenizer(), ["the sea is blue"])


def a_model(seed=0, **arguments):
    return tiny_model(seed, vocab_size=len(TOKENIZER), bos_token_id=TOKENIZER.bos_token_id, **arguments)


def test_saved_checkpoint_opens_here_and_in_transformers(tmp_path):
    model = a_model()
    save_checkpoint(model, TOKENIZER, tmp_path / "new" / "folder")
    loaded, tokenizer = load_checkpoint(tmp_path / "new" / "folder")
    assert not loaded.training
    ids = tokenizer("the sea is blue", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(auto(ids).logits, model(ids).logits)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")("sea")["input_ids"] == TOKENIZER("sea")["input_ids"]
    )


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path):
    save_checkpoint(a_model(0), TOKENIZER, tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    save_checkpoint(a_model(1), TOKENIZER, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == names
    loaded, _ = load_checkpoint(tmp_path)
    assert torch.equal(loaded.transformer.wte.weight, a_model(1).transformer.wte.weight)


def test_a_save_that_fails_leaves_the_old_checkpoint_or_none(tmp_path, monkeypatch):
    save_checkpoint(a_model(0), TOKENIZER, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(type(TOKENIZER), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        save_checkpoint(a_model(1), TOKENIZER, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    moves = []

    def replace(source, target):
        if len(moves) == 2:
            raise OSError("disk full")
        moves.append(target)
        source.rename(target)

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    with pytest.raises(OSError):
        save_checkpoint(a_model(1), TOKENIZER, tmp_path)
    with pytest.raises(ValmError, match=r"is no checkpoint: it has no config.json"):
        load_checkpoint(tmp_path)


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_what_is_no_checkpoint_is_said_in_one_sentence(tmp_path):
    with pytest.raises(ValmError, match="there is no checkpoint folder"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValmError, match="is no checkpoint"):
        load_checkpoint(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ValmError, match="holds a model of type 'gpt2', expected 'valm'"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_layer": 4}, "missing_keys transformer.h.2.attn.image"),
        ({"n_layer": 2}, "unexpected_keys"),
        ({"image_dim": 25}, "mismatched_keys"),
        ({"num_images": 0}, "unexpected_keys transformer.h.1.attn.image"),
        ({"fusion_layer": 5}, "fusion_layer must name one of the 3 blocks"),
    ],
)
def test_weights_of_another_config_are_refused(tmp_path, change, message, capfd):
    save_checkpoint(a_model(), TOKENIZER, tmp_path)
    change_config(tmp_path, **change)
    with pytest.raises(ValmError, match=message):
        load_checkpoint(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_damaged_weights_and_a_foreign_tokenizer_are_refused(tmp_path):
    save_checkpoint(a_model(), TOKENIZER, tmp_path)
    prune_tokenizer(TOKENIZER, []).save_pretrained(tmp_path)
    with pytest.raises(ValmError, match="has 514 pieces, but the model's vocab_size is"):
        load_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValmError, match="cannot be read"):
        load_checkpoint(tmp_path)
