import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.valm.models import tiny_model
from valm import checkpoint
from valm.checkpoint import load, load_checkpoint, save_checkpoint, save_retrieval
from valm.clip import Clip
from valm.errors import ValmError
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.folder import FolderSource
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import BlindRetriever, Retriever
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
    with pytest.raises(ValmError, match="has 514 tokens, but the model's vocab_size is"):
        load_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValmError, match="cannot be read"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("blind", [False, True])
def test_a_checkpoint_finds_its_pictures_again(tmp_path, clip, blind):
    clip.save(tmp_path / "clip")
    (tmp_path / "pictures").mkdir()
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "pictures" / f"{name}.png")
    kb = build(FolderSource(tmp_path / "pictures"), tmp_path / "kb", Clip.load(tmp_path / "clip"), progress=False)
    encoder = ContextEncoder(kb.load_clip(), query="state")
    tokenizer = encoder.clip.tokenizer
    model = tiny_model(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        image_dim=kb.dim,
        num_images=1 if blind else 2,
        blind=blind,
    )
    seeing = Retriever(encoder, kb, 1 if blind else 2)
    model.set_retriever(BlindRetriever(encoder) if blind else seeing)
    save_checkpoint(model, tokenizer, tmp_path / "model")
    save_retrieval(tmp_path / "model", seeing.kb, seeing.encoder.query)
    ids = tokenizer("a red apple", return_tensors="pt")["input_ids"]
    expected = model(ids).logits
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("model", "kb", "clip"):  # all of it together
        (tmp_path / name).rename(moved / name)
    assert json.loads((moved / "model" / "retrieval.json").read_text())["index"] == "exact"
    loaded, _ = load_checkpoint(moved / "model")
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert load_checkpoint(moved / "model", clip=moved / "clip")[0].retriever.encoder.query == "state"


def test_pictures_that_do_not_fit_are_refused(tmp_path, clip, make_kb):
    kb = make_kb(3)
    save_checkpoint(tiny_model(num_images=0, vocab_size=len(TOKENIZER)), TOKENIZER, tmp_path / "gpt2")
    with pytest.raises(ValmError, match="sees no images"):
        load_checkpoint(tmp_path / "gpt2", kb=kb.path)
    clip.save(tmp_path / "clip")
    # another vocabulary than the CLIP's is no hindrance
    save_checkpoint(a_model(image_dim=kb.dim), TOKENIZER, tmp_path / "other")
    loaded, _ = load_checkpoint(tmp_path / "other", kb=kb.path, clip=tmp_path / "clip")
    assert loaded.retriever.encoder.alignment is not None
    same = tiny_model(vocab_size=len(clip.tokenizer), image_dim=kb.dim + 1)
    save_checkpoint(same, clip.tokenizer, tmp_path / "wide")
    with pytest.raises(ValmError, match=r"do not fit: retriever\.dim is"):
        load_checkpoint(tmp_path / "wide", kb=kb.path, clip=tmp_path / "clip")


def test_the_saved_tokenizer_knows_how_long_the_models_texts_may_be(tmp_path):
    save_checkpoint(a_model(), TOKENIZER, tmp_path)
    _, tokenizer = load(tmp_path)
    assert tokenizer.model_max_length == 32
    assert TOKENIZER.model_max_length > 32
