"""A cut by retrieval score, in every way of reading."""

import pytest
import torch

from tests.valm.model.decoders import each_model
from tests.valm.models import HashRetriever, model_of, random_ids, tiny_model
from tests.valm.tiny_clip import TEXTS
from valm.errors import ValmError
from valm.evaluation.controls import RandomImages, switch_images
from valm.explain.explanation import explain
from valm.model.checkpoint import load, save_checkpoint
from valm.retrieval.context import ContextEncoder
from valm.retrieval.min_score import cut
from valm.retrieval.retriever import NoImages, Retriever


@pytest.fixture(scope="module")
def retriever(clip, make_kb):
    return Retriever(ContextEncoder(clip), make_kb(30), 3)


@pytest.fixture(scope="module")
def ids(clip):
    return clip.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]


@pytest.fixture(scope="module")
def middle(retriever, ids):
    """Half of the tokens are below it, and none is near it."""
    best = retriever(ids).scores.amax(-1)[0, 1:].sort().values
    return best[len(best) // 2 :][:2].mean().item()


@pytest.fixture
def model(clip, retriever, middle):
    model = model_of(clip.tokenizer, image_dim=clip.embed_dim, n_positions=128, min_score=middle)
    model.set_retriever(retriever)
    return model


def test_a_token_below_it_sees_no_images_however_it_is_read(model, retriever, ids, middle):
    found = retriever(ids)
    index, _ = cut(found.image_index, found.scores, middle)
    none = (index < 0).all(-1)[0]
    assert 2 < none.sum() < len(none) - 2
    expected = model(ids, image_pool=found.image_pool, image_index=index).logits
    assert not torch.allclose(expected, model(ids, image_pool=found.image_pool, image_index=found.image_index).logits)
    torch.testing.assert_close(model(ids).logits, expected)
    cache, rows = None, []
    for at in range(ids.shape[1]):
        out = model(ids[:, at : at + 1], cache=cache, use_cache=True)
        cache = out.cache
        rows.append(out.logits)
    torch.testing.assert_close(torch.cat(rows, 1), expected)
    _, weights = model.fusion_attention(ids, found.image_pool, index)
    assert (weights[0, :, none] == 0).all()


def test_generation_sees_what_forward_sees(model, ids):
    generated = model.generate(ids[:, :9], max_new_tokens=12, do_sample=False)
    expected = model(generated).logits[:, 8:-1].argmax(-1)
    assert torch.equal(generated[:, 9:], expected)
    uncut = model_of(model.retriever.encoder.tokenizer, image_dim=model.fusion_options.image_dim, n_positions=128)
    uncut.set_retriever(model.retriever)
    assert not torch.equal(uncut(generated).logits, model(generated).logits)


@each_model
def test_a_retriever_of_ones_own_is_cut_by_the_model(make):
    ids = random_ids(2, 9)
    found = HashRetriever()(ids)
    index, _ = cut(found.image_index, found.scores, 0.8)
    assert (index < 0).any() and (index >= 0).any()
    model = make(min_score=0.8)
    model.set_retriever(HashRetriever())
    expected = model(ids, image_pool=found.image_pool, image_index=index).logits
    torch.testing.assert_close(model(ids).logits, expected)


def test_it_is_saved_and_can_be_set_without_retrieving_again(model, retriever, ids, middle, tmp_path, clip):
    clip.save(tmp_path / "clip")
    save_checkpoint(model, clip.tokenizer, tmp_path / "model")
    assert f"with a retrieval score from {middle:.4g}, or none" in (tmp_path / "model" / "README.md").read_text()
    loaded, _ = load(tmp_path / "model", clip=tmp_path / "clip")  # in the precision of its training, as scores differ
    expected = model(ids).logits
    torch.testing.assert_close(loaded(ids).logits, expected)
    loaded.set_min_score(-1)
    uncut = retriever(ids)
    expected = model(ids, image_pool=uncut.image_pool, image_index=uncut.image_index).logits
    torch.testing.assert_close(loaded(ids).logits, expected)
    loaded.set_min_score(2)
    torch.testing.assert_close(
        loaded(ids).logits,
        model(ids, image_pool=uncut.image_pool[:0], image_index=uncut.image_index.clamp(max=-1)).logits,
    )
    before = loaded.retriever
    loaded.set_min_score(None)
    assert loaded.retriever.index is before.index and loaded.fusion_options.min_score is None


def test_controls_and_explanations_see_the_same_tokens(model, retriever, ids, middle, clip):
    found = retriever(ids)
    none = (cut(found.image_index, found.scores, middle)[0] < 0).all(-1)
    switch_images(model, "random")
    assert isinstance(model.retriever, RandomImages)
    random = model.retriever(ids)
    expected = model(ids, image_pool=random.image_pool, image_index=random.image_index.masked_fill(none[..., None], -1))
    torch.testing.assert_close(model(ids).logits, expected.logits)
    for finder in (None, retriever):
        model.set_retriever(retriever)
        page = explain(model, clip.tokenizer, TEXTS[0], retriever=finder)
        assert ((page.image_index < 0).all(-1) == none[0].numpy()).all()
        assert (page.image_weights[:, none[0].numpy()] == 0).all()

    class OwnRetriever:
        k, dim = retriever.k, retriever.dim

        def __call__(self, ids, attention_mask=None):
            return retriever(ids, attention_mask)

    page = explain(model, clip.tokenizer, TEXTS[0], retriever=OwnRetriever())
    assert ((page.image_index < 0).all(-1) == none[0].numpy()).all()
    switch_images(model, "off")
    assert isinstance(model.retriever, NoImages)


def test_what_does_not_fit_is_refused(model):
    for wrong in (float("nan"), "auto", True):
        with pytest.raises(ValmError, match="min_score must be a finite number"):
            model.set_min_score(wrong)
    with pytest.raises(ValmError, match="min_score is for a model that sees images, but num_images is 0"):
        tiny_model(num_images=0).set_min_score(0.5)
    with pytest.raises(ValmError, match="a blind model retrieves no images"):
        tiny_model(num_images=1, blind=True).set_min_score(0.5)
