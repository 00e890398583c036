"""Every way of loading a model finds its images, or says that they are missing."""

import json
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from tests.valm.model.decoders import tiny_llama
from tests.valm.models import tiny_model
from valm import load
from valm.clip.clip import Clip
from valm.errors import ValmError
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.folder import FolderSource
from valm.model.augment import augment
from valm.model.checkpoint import save_checkpoint
from valm.model.image_model import RetrievalCache, retrieval_cache_class, with_retrieval
from valm.retrieval.context import ContextEncoder
from valm.retrieval.note import RetrievalNote
from valm.retrieval.retriever import BlindRetriever, Retriever


@pytest.fixture(scope="module")
def retriever(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    clip.save(folder / "clip")
    (folder / "images").mkdir()
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (32, 32), colour).save(folder / "images" / f"{name}.png")
    kb = build(FolderSource(folder / "images"), folder / "kb", Clip.load(folder / "clip"), progress=False)
    return Retriever(ContextEncoder(kb.load_clip(), query="state"), kb, 2)


def model_for(retriever, **arguments):
    tokenizer = retriever.encoder.tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return tiny_model(vocab_size=len(tokenizer), image_dim=retriever.dim, num_images=retriever.k, **ids, **arguments)


@pytest.fixture
def saved(retriever, tmp_path):
    """A checkpoint folder, ids, and the logits that its model gives with its images."""
    model = model_for(retriever)
    model.set_retriever(retriever)
    tokenizer = retriever.encoder.tokenizer
    save_checkpoint(model, tokenizer, tmp_path / "model")
    ids = tokenizer("a red apple", return_tensors="pt")["input_ids"]
    return tmp_path / "model", ids, model(ids).logits.detach()


def test_auto_model_finds_the_images_of_a_checkpoint(saved):
    folder, ids, expected = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded._retriever is None  # nothing is opened before it is needed
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert loaded.retriever.encoder.query == "state"


@pytest.mark.parametrize("augmented", [False, True])
def test_the_number_of_images_may_change(retriever, tmp_path, augmented):
    tokenizer = retriever.encoder.tokenizer
    model = model_for(retriever)
    if augmented:
        model = augment(tiny_llama(vocab_size=len(tokenizer)), retriever.dim, retriever.k, logit_bias=0.0)
    model.set_retriever(retriever)
    ids = tokenizer("a red apple", return_tensors="pt")["input_ids"]
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


def test_a_pipeline_generates_with_images(saved, retriever):
    folder, _, _ = saved
    generate = pipeline("text-generation", str(folder))
    text = generate("a red apple", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("a red apple") and len(text) > len("a red apple")
    assert isinstance(generate.model.retriever, Retriever)


def test_saving_a_loaded_model_elsewhere_notes_its_images_again(saved, tmp_path):
    folder, ids, expected = saved
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "deep" / "copy")
    for file in folder.glob("tokenizer*"):
        (tmp_path / "deep" / "copy" / file.name).write_bytes(file.read_bytes())
    loaded, _ = load(tmp_path / "deep" / "copy")
    torch.testing.assert_close(loaded(ids).logits, expected)


def test_a_folder_without_a_tokenizer_is_named(saved, tmp_path):
    folder, ids, _ = saved
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    with pytest.raises(ValmError, match=r"no tokenizer can be loaded from .*copy; save one there"):
        loaded(ids)


def test_a_trainers_checkpoint_finds_its_images(retriever, tmp_path):
    model = model_for(retriever)
    model.set_retriever(retriever)
    tokenizer = retriever.encoder.tokenizer
    ids = tokenizer("a red apple", return_tensors="pt")["input_ids"]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no"
    )
    rows = [{"input_ids": ids[0], "labels": ids[0]}] * 8
    Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    loaded, _ = load(tmp_path / "checkpoint-1")
    model.eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert isinstance(loaded.retriever, Retriever)


def test_a_blind_model_notes_its_clip(retriever, tmp_path):
    blind = BlindRetriever(retriever.encoder)
    model = model_for(blind, blind=True)
    model.set_retriever(blind)
    save_checkpoint(model, retriever.encoder.tokenizer, tmp_path)
    ids = retriever.encoder.tokenizer("a red apple", return_tensors="pt")["input_ids"]
    assert "knowledge_base" not in json.loads((tmp_path / "retrieval.json").read_text())
    loaded, _ = load(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_knowledge_base_that_is_gone_is_named(saved, tmp_path):
    folder, ids, _ = saved
    note = RetrievalNote.read(folder)
    replace(note, knowledge_base=tmp_path / "gone").write(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValmError, match=r"cannot be retrieved: .*gone.*; set another retriever"):
        loaded(ids)
    loaded.set_retriever(None)
    with pytest.warns(UserWarning, match="has no retriever"):
        loaded(ids)


def test_a_folder_that_is_gone_before_its_note_was_read_is_named(saved):
    folder, ids, _ = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    folder.rename(folder.with_name("renamed"))
    with pytest.warns(UserWarning, match=r"has no retriever .*model, from which it was loaded, is gone, and with it"):
        loaded(ids)
    loaded.strict = True
    with pytest.raises(ValueError, match="from which it was loaded, is gone"):
        loaded(ids)
    loaded.set_retriever(None)
    with pytest.raises(ValueError, match=r"give image_pool and image_index$"):
        loaded(ids)


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


def test_a_model_without_its_images_says_so_once_or_raises():
    model = tiny_model()
    ids = torch.tensor([[1, 2, 3]])
    with pytest.warns(UserWarning, match="takes 3 images a token, but has no retriever"):
        model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)  # said already
        none = {"image_pool": torch.zeros(0, 24), "image_index": torch.full((1, 3, 3), -1)}
        tiny_model()(ids, **none)  # there are none, and that is known
        tiny_model(num_images=0)(ids)  # takes none
    model.strict = True
    with pytest.raises(ValueError, match="has no retriever and was given none"):
        model(ids)
    model(ids, **none)


def test_load_can_be_strict(tmp_path, clip):
    model = tiny_model(vocab_size=len(clip.tokenizer))
    save_checkpoint(model, clip.tokenizer, tmp_path)
    loaded, _ = load(tmp_path, strict=True)
    with pytest.raises(ValueError, match="has no retriever"):
        loaded(torch.tensor([[1, 2]]))


def test_a_cache_that_was_filled_without_the_retriever_is_refused(retriever):
    model = model_for(retriever)
    ids = torch.tensor([[1, 2, 3]])
    none = {"image_pool": torch.zeros(0, retriever.dim), "image_index": torch.full((1, 3, 2), -1)}
    cache = model(ids, use_cache=True, **none).cache
    model.set_retriever(retriever)
    with pytest.raises(
        ValueError, match="has 3 tokens, but the retriever has read 0 of them: the others were read without"
    ):
        model(ids, cache=cache)


class Rows:
    """A retriever's state that knows which row each of its rows came from."""

    def __init__(self, rows):
        self.rows = torch.as_tensor(rows)

    def reorder(self, beam_idx):
        self.rows = self.rows[beam_idx]


def test_the_retrievers_state_moves_with_the_rows_of_any_cache():
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8), 0)
    cache.__class__ = retrieval_cache_class(DynamicCache)
    assert isinstance(cache, DynamicCache) and isinstance(cache, RetrievalCache)
    cache.retrieval = Rows([0, 1])
    with pytest.raises(NotImplementedError, match="reorder_cache"):
        cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0, 0, 0]))
    assert cache.retrieval.rows.tolist() == [1, 0, 0, 0]
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert cache.retrieval.rows.tolist() == [1, 0]
    with pytest.raises(NotImplementedError, match="assisted decoding"):
        cache.crop(1)
    cache.reset()
    assert cache.retrieval is None


def test_minimaxs_linear_attention_moves_with_the_rows():
    """The layers here are full, linear and full attention; MiniMax's own batch_select_indices fails with them."""
    cache = MiniMaxCache()
    state = torch.arange(2.0).view(2, 1, 1, 1)
    cache.set_linear_cache(1, state)
    for layer in (0, 2):
        cache.update(state, state, layer)
    with_retrieval(cache).reorder_cache(torch.tensor([1, 1]))
    for rows in (cache.layers[0].keys, cache.linear_cache[1], cache.layers[2].values):
        assert rows.flatten().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({"query": "eot", "clip_name": "clip", "clip_sha256": "0" * 64}, "names neither a knowledge_base nor a clip"),
        ({"knowledge_base": "../kb"}, "is damaged: it has no 'query'"),
        ({"query": "what"}, "is damaged: query is 'what', expected 'eot' or 'state'"),
        ([], "is damaged: it is a list"),
    ],
)
def test_a_damaged_note_is_named(tmp_path, note, message):
    (tmp_path / "retrieval.json").write_text(json.dumps(note))
    with pytest.raises(ValmError, match=r"retrieval\.json " + message):
        RetrievalNote.read(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "dead link"])
def test_a_note_that_is_no_file_is_not_taken_for_none(tmp_path, kind):
    note = tmp_path / "retrieval.json"
    note.mkdir() if kind == "folder" else note.symlink_to("nowhere")
    with pytest.raises(ValmError, match=r"retrieval\.json"):
        RetrievalNote.read(tmp_path)


def test_a_retriever_that_reads_more_tokens_than_the_model_has_is_refused(retriever):
    """Made without the model's tokenizer, it would read its ids as CLIP's."""
    model = augment(tiny_llama(), image_dim=retriever.dim, num_images=retriever.k)
    with pytest.raises(
        ValmError, match=r"encoder reads \d+ tokens, and this model has 64: give its ContextEncoder the"
    ):
        model.set_retriever(retriever)


def test_a_retriever_without_a_tokenizer_is_for_clips_vocabulary_only(retriever):
    """The ids of a larger one would be read as CLIP's. A padded one has as many tokens as CLIP's tokenizer."""
    tokenizer, kb = retriever.encoder.tokenizer, retriever.kb
    for rows, accepted in ((0, True), (127, True), (500, False)):
        model = augment(tiny_llama(vocab_size=len(tokenizer) + rows), retriever.dim, retriever.k)
        if accepted:
            model.set_retriever(retriever)
            continue
        for other in (retriever, Retriever(ContextEncoder(kb.load_clip()), kb, retriever.k)):
            with pytest.raises(ValmError, match=rf"this model has {len(tokenizer) + rows}: give its .* \(tokenizer=\)"):
                model.set_retriever(other)
        model.set_retriever(Retriever(ContextEncoder(kb.load_clip(), tokenizer=tokenizer), kb, retriever.k))
