"""Every way of loading a model finds its images, or says that they are missing."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.tolerance import assert_agree
from tests.valm.model.decoders import augmented, random_images, tiny_llama
from tests.valm.models import HashRetriever, model_for, random_ids, tiny_model
from tests.valm.three_images import retriever_in
from tests.valm.tiny_clip import make_clip
from valm.errors import ValmError
from valm.model.augment import augment
from valm.model.checkpoint import load, save_checkpoint
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import Retriever
from valm.retrieval.source import RetrievalSource, write_places


def test_auto_model_finds_the_images_of_a_checkpoint(saved):
    folder, ids, expected = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.finder._retriever is None  # nothing is opened before it is needed
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert loaded.retriever.encoder.query == "state"


def test_a_folder_without_a_tokenizer_is_named(saved, tmp_path):
    folder, ids, _ = saved
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    with pytest.raises(ValmError, match=r"no tokenizer can be loaded from .*copy: save one there"):
        loaded(ids)


def test_a_knowledge_base_that_is_gone_is_named(saved, tmp_path):
    folder, ids, _ = saved
    write_places(RetrievalSource("eot", knowledge_base=tmp_path / "gone"), folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValmError, match=r"cannot be retrieved: .*gone.*; set another retriever"):
        loaded(ids)
    loaded.set_retriever(None)
    with pytest.warns(UserWarning, match="has no retriever"):
        loaded(ids)


def test_a_folder_that_is_gone_with_the_tokenizer_is_named(saved):
    folder, ids, _ = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    folder.rename(folder.with_name("renamed"))
    with pytest.raises(ValmError, match=r"images of the model in .*model cannot be retrieved: no tokenizer can be"):
        loaded(ids)
    loaded.strict = True
    loaded.set_retriever(None)
    with pytest.raises(ValueError, match=r"give image_pool and image_index$"):
        loaded(ids)


def test_a_model_that_is_in_no_folder_opens_nothing(retriever):
    """As one that trains on a retrieved corpus, and was made from nothing."""
    model = model_for(retriever)
    model.finder.set_source(RetrievalSource.of_retriever(retriever))
    with pytest.warns(UserWarning, match="has no retriever"):
        model(torch.tensor([[1, 2]]))


def test_a_retriever_is_compared_with_that_of_the_saved_model(retriever, tmp_path):
    """One that was never saved may have any."""
    model, other = model_for(retriever), retriever_in(tmp_path, make_clip(retriever.encoder.tokenizer, seed=1))
    for each in (retriever, other, retriever):
        model.set_retriever(each)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValmError, match="this model was saved with the CLIP"):
        model.set_retriever(other)
    assert model.retriever is retriever


def test_the_precision_of_a_retriever_that_was_set_is_read_again(seeing, saved, monkeypatch):
    """Otherwise the model would see other images, without a word, than those that it was saved with."""
    folder, ids, expected = saved
    kept = seeing.retriever.encoder.tower.dtype
    other = torch.float32 if kept == torch.bfloat16 else torch.bfloat16
    monkeypatch.setattr("valm.retrieval.source.fastest_dtype", lambda device: other)
    opened = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(opened(ids).logits, expected)
    assert opened.retriever.encoder.tower.dtype == kept
    asked, tokenizer = load(folder, query_dtype=torch.float64)
    assert asked.retriever.encoder.tower.dtype == torch.float64
    save_checkpoint(asked, tokenizer, folder)
    assert load(folder)[0].retriever.encoder.tower.dtype == torch.float64


def test_a_retriever_that_nobody_chose_is_as_fast_as_the_machine_can(retriever, tmp_path, monkeypatch):
    """Also after the model was used and saved again elsewhere."""
    model, tokenizer = model_for(retriever), retriever.encoder.tokenizer
    model.finder.set_source(RetrievalSource.of_retriever(retriever))
    for dtype in (torch.bfloat16, torch.float64):
        save_checkpoint(model, tokenizer, tmp_path / "model")
        monkeypatch.setattr("valm.retrieval.source.fastest_dtype", lambda device, dtype=dtype: dtype)
        model, tokenizer = load(tmp_path / "model")
        assert model.retriever.encoder.tower.dtype == dtype


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
    with pytest.raises(ValueError, match="has no retriever and was given no images"):
        model(ids)
    model(ids, **none)


def test_a_retriever_that_reads_more_tokens_than_the_model_has_is_refused(retriever):
    """Made without the model's tokenizer, it would read its ids as CLIP's."""
    model = augment(tiny_llama(), image_dim=retriever.dim, num_images=retriever.k)
    with pytest.raises(ValmError, match=r"encoder has \d+ tokens, but this model has 64: pass the model's tokenizer"):
        model.set_retriever(retriever)


def test_a_retriever_without_a_tokenizer_is_for_clips_vocabulary_only(retriever):
    """The ids of a larger one would be read as CLIP's. A padded one has as many tokens as CLIP's tokenizer."""
    tokenizer, kb = retriever.encoder.tokenizer, retriever.kb
    for rows in (0, 127, 500):
        vocab_size = len(tokenizer) + rows
        model = augment(tiny_llama(vocab_size=vocab_size), retriever.dim, retriever.k)
        if rows < 128:
            model.set_retriever(retriever)
    for other in (retriever, Retriever(ContextEncoder(kb.load_clip()), kb, retriever.k)):
        with pytest.raises(ValmError, match=rf"this model has {vocab_size}: pass the model's .* \(tokenizer=\)"):
            model.set_retriever(other)
    model.set_retriever(Retriever(ContextEncoder(kb.load_clip(), tokenizer=tokenizer), kb, retriever.k))


def tiny_llava(seed):
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision_config = CLIPVisionConfig(**vision, image_size=28, patch_size=14)
    config = LlavaConfig(vision_config=vision_config, text_config=tiny_llama(seed).config, image_token_id=63)
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def test_documents_in_a_row_of_a_decoder_inside_another():
    """Both have a finder: the outer one finds the images, and the inner one takes what it is given."""
    model = augmented(tiny_llava)
    model.set_retriever(HashRetriever())
    model.strict = True
    first, second = random_ids(1, 6), random_ids(1, 4, seed=1)
    ids = torch.cat([first, second, second[:, :2]], 1)
    mask = torch.tensor([[1] * 10 + [0] * 2])
    positions = torch.tensor([[*range(6), *range(4), 4, 5]])
    expected = torch.cat([model(part).logits for part in (first, second)], 1)
    found = model(ids, attention_mask=mask, position_ids=positions).logits[:, :10]
    assert_agree(found, expected)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_takes_images_and_positions(strict):
    """Documents in a row are told apart, or end it with an error."""
    model, images = augmented(), random_images(1, 6)
    given = {"input_ids": random_ids(1, 6), "position_ids": torch.arange(6)[None], "use_cache": False, **images}
    program = torch.export.export(model, (), given, strict=strict).module()
    assert_agree(program(**given).logits, model(**given).logits)
    packed = given | {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    if strict:
        assert_agree(program(**packed).logits, model(**packed).logits)
    else:
        with pytest.raises(RuntimeError, match="a row contains several documents"):
            program(**packed)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_no_retriever(strict):
    model = augmented()
    model.set_retriever(HashRetriever())
    with pytest.raises(Exception, match="an exported program cannot contain a retriever: give image_pool"):
        torch.export.export(model, (), {"input_ids": random_ids(1, 6), "use_cache": False}, strict=strict)
