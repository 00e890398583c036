"""What saves a model that takes images, and what changes it."""

import pickle
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments, pipeline

from tests.valm.model.decoders import augmented, tiny_llama
from tests.valm.models import tiny_model
from valm import load
from valm.model.adapter import save_adapter
from valm.model.augment import augment
from valm.model.checkpoint import save_checkpoint
from valm.retrieval.retriever import Retriever


@pytest.mark.parametrize("of_llama", [False, True])
def test_the_number_of_images_may_change(retriever, seeing, apple, tmp_path, of_llama):
    tokenizer, model, ids = retriever.encoder.tokenizer, seeing, apple
    if of_llama:
        model = augment(tiny_llama(vocab_size=len(tokenizer)), retriever.dim, retriever.k, logit_bias=0.0)
        model.set_retriever(retriever)
    before = model(ids).logits
    for k in (1, 3):
        model.set_num_images(k)
        found = Retriever(retriever.encoder, retriever.kb, k)(ids)
        expected = model(ids, image_pool=found.image_pool, image_index=found.image_index).logits
        torch.testing.assert_close(model(ids).logits, expected)
        assert not torch.allclose(expected, before)
        again = pickle.loads(pickle.dumps(model.retriever))
        assert again.k == k and again(ids).image_index.shape[-1] == k
    assert retriever.k == 2 and retriever(ids).image_index.shape[-1] == 2
    for wrong in (2.5, True):
        with pytest.raises(TypeError, match="the number of images must be an int, got"):
            model.set_num_images(wrong)
    save_checkpoint(model, tokenizer, tmp_path / "model")
    torch.testing.assert_close(load(tmp_path / "model")[0](ids).logits, expected)


@pytest.mark.parametrize("make", [tiny_model, augmented])
def test_models_of_one_config_change_apart(make):
    first = make()
    second = type(first)(first.config)
    first.set_min_score(0.5)
    assert first.fusion_options.min_score == 0.5 and second.fusion_options.min_score is None
    assert second.config is second.base_model.config is second.finder.config


def test_a_pipeline_generates_with_images(saved, retriever):
    folder, _, _ = saved
    generate = pipeline("text-generation", str(folder))
    text = generate("a red apple", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("a red apple") and len(text) > len("a red apple")
    assert isinstance(generate.model.retriever, Retriever)


def test_a_trainers_checkpoint_finds_its_images(seeing, apple, tmp_path, monkeypatch):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no"
    )
    rows = [{"input_ids": apple[0], "labels": apple[0]}] * 8
    tokenizer = seeing.retriever.encoder.tokenizer
    Trainer(seeing, arguments, train_dataset=rows, processing_class=tokenizer).train()
    expected = seeing.eval()(apple).logits
    assert (tmp_path / "_retrieval.json").is_file() and not (tmp_path / "checkpoint-1" / "_retrieval.json").exists()
    monkeypatch.chdir(tmp_path / "checkpoint-1")
    (tmp_path / "best").symlink_to("checkpoint-1")
    for folder in (tmp_path / "checkpoint-1", tmp_path / "best", "."):
        loaded, _ = load(folder)
        torch.testing.assert_close(loaded(apple).logits, expected)
        assert isinstance(loaded.retriever, Retriever)
    loaded.save_pretrained(tmp_path / "again" / "checkpoint-2")
    assert (tmp_path / "again" / "_retrieval.json").is_file()


def test_a_trainers_checkpoint_that_was_copied_alone_says_what_it_lacks(retriever, seeing, tmp_path):
    seeing.save_pretrained(tmp_path / "checkpoint-1")
    retriever.encoder.tokenizer.save_pretrained(tmp_path / "checkpoint-1")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "elsewhere" / "checkpoint-1")
    lacks = r"nothing says where the model's knowledge base kb \(SHA-256 \w{12}\) is: give it as kb \(--kb\)$"
    with pytest.warns(UserWarning, match=f"^{lacks}"):
        loaded, _ = load(tmp_path / "elsewhere" / "checkpoint-1", strict=True)
    with pytest.raises(ValueError, match="has no retriever"):
        loaded(torch.tensor([[1, 2]]))
    loaded, _ = load(tmp_path / "elsewhere" / "checkpoint-1", kb=retriever.kb.path)
    assert isinstance(loaded.retriever, Retriever)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_folder_that_is_named_as_a_trainers_checkpoint(retriever, seeing, apple, tmp_path, adapter):
    """It finds its own images, whatever stands in the folder above."""
    (tmp_path / "_retrieval.json").write_text('{"knowledge_base": "gone", "base": "gone"}')
    folder, tokenizer, model = tmp_path / "checkpoint-7", retriever.encoder.tokenizer, seeing
    if adapter:
        tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = augment(base, retriever.dim, retriever.k, logit_bias=0.0).eval()
        model.set_retriever(retriever)
        save_adapter(model, folder)
    else:
        save_checkpoint(model, tokenizer, folder)
    torch.testing.assert_close(load(folder)[0](apple).logits, model(apple).logits)


def test_adapters_of_transformers_are_saved_beside_what_is_there(tmp_path, monkeypatch):
    """transformers writes these alone, without a config."""
    saved = []
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda self, folder, **options: saved.append(options))
    (tmp_path / "image_fusion.json").write_text("{}")
    model = tiny_model()
    model._hf_peft_config_loaded = True
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    assert saved == [{"max_shard_size": "1GB"}]
    assert [file.name for file in tmp_path.iterdir()] == ["image_fusion.json"]
