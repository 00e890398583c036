import shutil

import pytest
from huggingface_hub import ModelCard

import valm
from tests.valm.model.decoders import augmented
from tests.valm.models import tiny_model
from valm.model.card import MARKER, base_name, write_card
from valm.model.checkpoint import load, save_checkpoint
from valm.retrieval.source import ImageSource


@pytest.fixture(scope="module")
def kb(make_kb):
    return make_kb(5)


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def test_a_checkpoint_has_a_card(tmp_path, tokenizer, kb):
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(vocab_size=len(tokenizer), image_dim=kb.dim, **ids)
    model.finder.set_source(ImageSource.of_knowledge_base(kb, "eot"))
    numbers = {"loss": 1.23456, "eval_perplexity": 17.0}
    command = "valm train /data/me/x --seed 1 --kb=secret/kb/"
    save_checkpoint(model, tokenizer, tmp_path / "it", numbers=numbers, command=command)
    card = card_of(tmp_path / "it")
    assert card.data.library_name == "valm" and card.data.pipeline_tag == "text-generation"
    assert kb.fingerprint in card.text and kb.manifest["clip"]["weights_hash"] in card.text
    assert "| loss | 1.235 |" in card.text and "| eval_perplexity | 17 |" in card.text
    assert "valm train x --seed 1 --kb=kb\n" in card.text and 'valm.load("FOLDER", kb="KNOWLEDGE_BASE")' in card.text
    assert str(kb.path.parent) not in card.text  # folders are nobody else's business
    load(tmp_path / "it")


def test_a_card_of_the_users_own_stays(tmp_path):
    model = tiny_model(num_images=0)
    assert write_card(model, tmp_path) == tmp_path / "README.md"
    assert "sees no images" in card_of(tmp_path).text
    own = (tmp_path / "README.md").read_text().replace(MARKER, "Mine.")
    (tmp_path / "README.md").write_text(own)
    assert write_card(model, tmp_path, numbers={"loss": 1}) is None
    assert (tmp_path / "README.md").read_text() == own


def test_an_augmented_model_names_its_base(tmp_path):
    model = augmented()
    for name, expected in (("org/name", "org/name"), ("", None), (str(tmp_path), None), ("/models/mine", None)):
        model.config.name_or_path = name
        assert base_name(model) == expected
    model.config.name_or_path = "org/name"
    write_card(model, tmp_path)
    card = card_of(tmp_path)
    assert card.data.base_model == "org/name" and "`valm.augment` of a LlamaForCausalLM" in card.text


@pytest.mark.parametrize("scale", [None, 1.0])
def test_a_card_names_the_arguments_of_images(tmp_path, scale):
    write_card(tiny_model(score_scale=scale), tmp_path)
    assert "`image_index`" in card_of(tmp_path).text
    assert ("`image_scores`" in card_of(tmp_path).text) == (scale is not None)


def test_every_way_of_saving_writes_a_card_and_leaves_the_users_own(tmp_path, kb):
    model = augmented()
    model.config.name_or_path = "org/name"
    valm.save_adapter(model, tmp_path / "adapter")
    card = card_of(tmp_path / "adapter")
    assert card.data.base_model == "org/name" and "- The base model `org/name`." in card.text
    assert 'valm.load("FOLDER")' in card.text
    model.config.name_or_path = str(tmp_path)
    valm.save_adapter(model, tmp_path / "adapter")
    text = card_of(tmp_path / "adapter").text
    assert "- The LlamaForCausalLM that it was made of." in text and str(tmp_path) not in text
    model.save_pretrained(tmp_path / "whole")
    assert "base model" not in card_of(tmp_path / "whole").text
    for folder, save in (("adapter", valm.save_adapter), ("whole", type(model).save_pretrained)):
        (tmp_path / folder / "README.md").write_text("Mine.")
        save(model, tmp_path / folder)
        assert (tmp_path / folder / "README.md").read_text() == "Mine."


def test_a_loaded_model_says_what_it_lacks(tmp_path, tokenizer, clip, kb):
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(vocab_size=len(tokenizer), image_dim=kb.dim, **ids)
    shutil.copytree(kb.path, tmp_path / "kb")
    source = ImageSource.of_knowledge_base(valm.ImageKnowledgeBase.open(tmp_path / "kb"), "eot")
    model.finder.set_source(source)
    save_checkpoint(model, tokenizer, tmp_path / "it")
    load(tmp_path / "it")
    shutil.rmtree(tmp_path / "kb")
    with pytest.warns(UserWarning, match=r"knowledge base .*kb is not there: give it as kb \(--kb\)"):
        load(tmp_path / "it")
    (tmp_path / "it" / "_retrieval.json").unlink()
    with pytest.warns(
        UserWarning, match=r"nothing says where the model's knowledge base kb \(SHA-256 \w{12}\) is: give"
    ):
        load(tmp_path / "it")
    blind = tiny_model(vocab_size=len(tokenizer), image_dim=kb.dim, num_images=1, blind=True, **ids)
    blind.finder.set_source(ImageSource("eot", "clip", "0" * 64, clip=str(tmp_path / "clip")))
    save_checkpoint(blind, tokenizer, tmp_path / "blind")
    with pytest.warns(UserWarning, match=r"CLIP .*clip is not there: give it as clip \(--clip\)"):
        load(tmp_path / "blind")
