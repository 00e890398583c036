"""The model with a real CLIP, knowledge base and retriever: token by token equals all at once."""

import pytest
import torch

from tests.valm.models import again_from_the_start, model_of
from tests.valm.other_tokenizers import llama_like
from tests.valm.tiny_clip import TEXTS
from valm.clip.tokenizer import load_tokenizer
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import BlindRetriever, Retriever


@pytest.fixture(scope="module", params=["nearest, CLIP's tokenizer", "blind, Llama's tokenizer"])
def model(request, clip, make_kb, tmp_path_factory):
    tokenizer, blind = clip.tokenizer, "blind" in request.param
    if blind:
        folder = tmp_path_factory.mktemp("tokenizer")
        llama_like().save_pretrained(folder)
        tokenizer = load_tokenizer(folder)
    encoder = ContextEncoder(clip, tokenizer=tokenizer)
    retriever = BlindRetriever(encoder) if blind else Retriever(encoder, make_kb(30), 3)
    model = model_of(tokenizer, image_dim=clip.embed_dim, num_images=retriever.k, blind=blind, n_positions=128)
    model.set_retriever(retriever)
    return model


@pytest.fixture
def text_ids(model):
    """What the model's tokenizer makes of a text, or of several with padding."""
    return lambda *texts: model.retriever.encoder.tokenizer(list(texts), padding=True, return_tensors="pt")


def test_generate_equals_reading_it_all_again(model, text_ids):
    ids = text_ids(TEXTS[0])["input_ids"][:, :10]
    # more than a segment of this CLIP
    out = model.generate(ids, max_new_tokens=25, do_sample=False, eos_token_id=None)
    assert torch.equal(out, again_from_the_start(model, ids, 25))


def test_left_padded_prompts_continue_as_each_alone(model, text_ids):
    batch = text_ids("a red apple lies", "the sky is blue! is the grass green?")
    assert not batch["attention_mask"][0, 0]
    out = model.generate(**batch, max_new_tokens=10, do_sample=False, eos_token_id=None)
    for row, mask, continued in zip(batch["input_ids"], batch["attention_mask"], out, strict=True):
        prompt = row[mask.bool()][None]
        assert torch.equal(continued[-10:], again_from_the_start(model, prompt, 10)[0, -10:])


@torch.no_grad()
def test_a_cache_is_saved_and_loaded_with_the_retrievers_state(model, text_ids, tmp_path):
    ids = text_ids(TEXTS[0])["input_ids"][:, :10]
    cache = model(ids[:, :5], use_cache=True).cache
    cache = model(ids[:, 5:7], cache=cache).cache
    torch.save(cache, tmp_path / "cache.pt")
    expected = model(ids[:, 7:], cache=cache).logits
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert type(loaded) is type(cache)
    torch.testing.assert_close(model(ids[:, 7:], cache=loaded).logits, expected)


def test_blind_and_seeing_models_take_their_own_kind_of_retriever(model, clip, make_kb):
    encoder = ContextEncoder(clip)
    wrong = Retriever(encoder, make_kb(3), 1) if model.fusion_options.blind else BlindRetriever(encoder)
    with pytest.raises(ValueError, match=r"this model needs a (Blind)?Retriever"):
        model.set_retriever(wrong)
