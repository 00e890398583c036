import shutil

import pytest
from huggingface_hub import ModelCard

import valm
from tests.valm.model.decoders import augmented
from tests.valm.models import model_for, tiny_model
from tests.valm.three_images import retriever_in
from valm.model.card import MARKER, base_name, write_card
from valm.model.checkpoint import load, save_checkpoint
from valm.retrieval.retriever import BlindRetriever


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def test_a_checkpoint_has_a_card(tmp_path, retriever, seeing):
    kb, numbers = retriever.kb, {"loss": 1.23456, "eval_perplexity": 17.0}
    command = "valm train /data/me/x --seed 1 --kb=secret/kb/"
    save_checkpoint(seeing, retriever.encoder.tokenizer, tmp_path, numbers=numbers, command=command)
    card = card_of(tmp_path)
    assert card.data.library_name == "valm" and card.data.pipeline_tag == "text-generation"
    assert kb.fingerprint in card.text and kb.manifest["clip"]["weights_hash"] in card.text
    assert "| loss | 1.235 |" in card.text and "| eval_perplexity | 17 |" in card.text
    assert "valm train x --seed 1 --kb=kb\n" in card.text and 'valm.load("FOLDER", kb="KNOWLEDGE_BASE")' in card.text
    assert str(kb.path.parent) not in card.text  # folders are nobody else's business


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
        model.config.base_place = name
        assert base_name(model) == expected


def test_a_card_names_the_arguments_of_images(tmp_path):
    write_card(tiny_model(), tmp_path)
    assert "`image_pool`, `image_index`" in card_of(tmp_path).text


def test_every_way_of_saving_writes_a_card_and_leaves_the_users_own(tmp_path):
    model = augmented()
    model.config.base_place = "org/name"
    valm.save_adapter(model, tmp_path / "adapter")
    card = card_of(tmp_path / "adapter")
    assert card.data.base_model == "org/name" and "- The base model `org/name`." in card.text
    assert "`valm.augment` of a LlamaForCausalLM" in card.text and 'valm.load("FOLDER")' in card.text
    model.config.base_place = str(tmp_path)
    valm.save_adapter(model, tmp_path / "adapter")
    text = card_of(tmp_path / "adapter").text
    assert "- The LlamaForCausalLM that was augmented." in text and str(tmp_path) not in text
    model.save_pretrained(tmp_path / "whole")
    assert "base model" not in card_of(tmp_path / "whole").text
    for folder, save in (("adapter", valm.save_adapter), ("whole", type(model).save_pretrained)):
        (tmp_path / folder / "README.md").write_text("Mine.")
        save(model, tmp_path / folder)
        assert (tmp_path / folder / "README.md").read_text() == "Mine."


def test_a_loaded_model_says_what_it_lacks(tmp_path, clip, monkeypatch):
    """Also where a folder of the same name lies beside the process's own."""
    for folder in ("clip", "here"):
        (tmp_path / "elsewhere" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere" / "here")
    seeing = retriever_in(tmp_path, clip)
    blind = BlindRetriever(seeing.encoder)
    for name, retriever in (("it", seeing), ("blind", blind)):
        model = model_for(retriever, blind=retriever is blind)
        model.set_retriever(retriever)
        save_checkpoint(model, seeing.encoder.tokenizer, tmp_path / name)
        load(tmp_path / name)
    shutil.rmtree(tmp_path / "kb")
    with pytest.warns(UserWarning, match=r"knowledge base .*kb is not there: give it as kb \(--kb\)"):
        load(tmp_path / "it")
    (tmp_path / "it" / "_retrieval.json").unlink()
    without_place = r"nothing says where the model's knowledge base kb \(SHA-256 \w{12}\) is: give"
    with pytest.warns(UserWarning, match=without_place):
        load(tmp_path / "it")
    shutil.rmtree(tmp_path / "clip")
    with pytest.warns(UserWarning, match=r"CLIP .*clip is not there: give it as clip \(--clip\)"):
        load(tmp_path / "blind")
