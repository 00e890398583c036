"""A model that asks for its images by its own head: the same images at every way of reading, and only with its CLIP."""

import copy
import pickle

import pytest
import torch
from PIL import Image

from tests.valm.models import model_of, tiny_model
from tests.valm.tiny_clip import TEXTS, make_clip
from valm.errors import ValmError
from valm.evaluation.controls import RandomImages, switch_images
from valm.explain.explanation import explain
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.folder import FolderSource
from valm.model.checkpoint import load, save_checkpoint
from valm.model.config import ValmConfig
from valm.model.query_head import SelfEncoder, SelfRetriever
from valm.retrieval.min_score import cut
from valm.retrieval.note import RetrievalNote
from valm.retrieval.retriever import NoImages


@pytest.fixture(scope="module")
def kb(make_kb):
    return make_kb(30)


@pytest.fixture(scope="module")
def model(clip, kb):
    tokenizer = clip.tokenizer
    model = model_of(tokenizer, image_dim=clip.embed_dim, n_positions=128, query_clip=clip.weights_hash)
    model.set_retriever(SelfRetriever(SelfEncoder(model, tokenizer, kb), kb, 3))
    return model


@pytest.fixture
def text_ids(clip):
    return lambda *texts: clip.tokenizer(list(texts), padding=True, return_tensors="pt")


def test_the_images_are_those_nearest_to_the_heads_queries(model, kb, text_ids):
    ids = text_ids(TEXTS[0])["input_ids"]
    queries = model.self_queries(ids)
    assert queries.shape == (1, ids.shape[1], kb.dim)
    assert not queries[:, 0].any()  # the first token has none
    torch.testing.assert_close(queries[:, 1:].norm(dim=-1), torch.ones(ids[:, 1:].shape))
    found = model.retriever(ids)
    assert len(found.image_ids) > 3, "all tokens see the same images, so the test says little"
    best = (queries @ torch.from_numpy(kb.vectors()).float().T).topk(3).indices
    assert torch.equal(found.image_ids[found.image_index][:, 1:], best[:, 1:])
    assert (found.image_index[:, 0] == -1).all()
    given = model(ids, image_pool=found.image_pool, image_index=found.image_index).logits
    torch.testing.assert_close(model(ids).logits, given)
    assert (model(ids, image_pool=-found.image_pool, image_index=found.image_index).logits - given).abs().max() > 1e-2


def test_a_weak_token_has_no_images(model, text_ids):
    ids = text_ids(TEXTS[0])["input_ids"]
    found, scores = model.retriever.find(ids)
    best = scores.amax(-1)[0, 1:].sort().values
    other = model.retriever.with_min_score(best[len(best) // 2].item())
    expected, _ = cut(found, scores, other.min_score)
    assert (expected >= 0).any(-1).sum() == len(best) - len(best) // 2
    assert torch.equal(other.find(ids)[0], expected)
    assert torch.equal(other(ids).image_index >= 0, expected >= 0)


def test_token_by_token_equals_the_whole_text(model, text_ids):
    ids = text_ids(TEXTS[0])["input_ids"]
    whole = model(ids).logits
    cache, rows = None, []
    for position in range(ids.shape[1]):
        out = model(ids[:, position : position + 1], cache=cache, use_cache=True)
        cache = out.cache
        rows.append(out.logits)
    torch.testing.assert_close(torch.cat(rows, 1), whole)
    assert cache.retrieval.length == ids.shape[1]
    torch.testing.assert_close(model(ids[:, :7]).logits, whole[:, :7])


def test_a_cache_that_the_head_did_not_fill_is_refused(model, text_ids):
    ids = text_ids(TEXTS[0])["input_ids"]
    found = model.retriever(ids[:, :8])
    out = model(ids[:, :8], image_pool=found.image_pool, image_index=found.image_index, use_cache=True)
    with pytest.raises(ValueError, match="the retriever has read 0 of them"):
        model(ids[:, 8:], cache=out.cache)


def test_a_text_longer_than_the_model_reads_is_refused(model):
    with pytest.raises(ValueError, match="this model has 128 positions"):
        model.retriever(torch.zeros(1, 129, dtype=torch.int64))


def test_autocast_changes_no_query(model, text_ids):
    ids = text_ids(TEXTS[0])["input_ids"]
    expected = model.retriever(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.retriever(ids)
        steps = model.retriever.step(ids, model.retriever.start(1))
    assert torch.equal(found.scores, expected.scores)
    torch.testing.assert_close(steps.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_find_the_same_images(model, text_ids):
    ids = text_ids(TEXTS[0])["input_ids"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.retriever.encoder.model is other
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_its_images_are_explained(model, clip, text_ids):
    """Also with others in their place, whose scores are looked up."""
    head = model.query_head
    try:
        head.requires_grad_(True)  # as after loading
        explained = explain(model, clip.tokenizer, TEXTS[0])
        assert len(explained.images) > 3
        random = RandomImages(model.retriever, 0)
        assert explain(model, clip.tokenizer, TEXTS[0], retriever=random).images != explained.images
    finally:
        head.requires_grad_(False)


def test_a_compiled_model_asks_the_retriever_that_it_has_now(model, text_ids):
    ids, own = text_ids(TEXTS[0])["input_ids"], model.retriever
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    before = compiled(ids).logits
    torch.testing.assert_close(before, model(ids).logits)
    try:
        model.set_retriever(NoImages(3, model.config.image_dim))
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        assert (compiled(ids).logits - before).abs().max() > 1e-2
    finally:
        model.set_retriever(own)
        torch._dynamo.reset()


def test_padded_rows_see_the_images_of_each_row_alone(model, text_ids):
    batch = text_ids("a red apple lies", "the sky is blue! is the grass green?")
    mask = batch["attention_mask"].bool()
    assert not mask[0, 0]
    assert not model.self_queries(**batch)[~mask].any()
    together = model(**batch).logits
    for row, present, logits in zip(batch["input_ids"], mask, together, strict=True):
        torch.testing.assert_close(logits[present], model(row[present][None]).logits[0])


def test_generate_equals_reading_it_all_again(model, text_ids):
    ids = text_ids(TEXTS[0])["input_ids"][:, :10]
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    again = ids
    for _ in range(12):
        again = torch.cat([again, model(again).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, again)
    beams = {**arguments, "num_beams": 3, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, **beams, use_cache=False))


def test_a_checkpoint_keeps_the_head_and_finds_the_same_images(model, clip, kb, text_ids, tmp_path):
    ids = text_ids(TEXTS[1])["input_ids"]
    save_checkpoint(model, clip.tokenizer, tmp_path / "model")
    note = RetrievalNote.read(tmp_path / "model")
    assert note is not None and note.query == "self"
    for arguments in ({}, {"kb": kb.path}):
        loaded, _ = load(tmp_path / "model", **arguments)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert isinstance(loaded.retriever, SelfRetriever)
        assert "clip" not in vars(loaded.retriever.encoder), "the CLIP was loaded"
    assert f"- No CLIP: this model predicts the queries of `{clip.name}`" in (tmp_path / "model/README.md").read_text()


def test_another_knowledge_base_of_its_clip_is_named(model, clip, make_kb, tmp_path):
    save_checkpoint(model, clip.tokenizer, tmp_path / "model")
    with pytest.warns(UserWarning, match="was saved with the knowledge base .*, and its images are now those of"):
        loaded, _ = load(tmp_path / "model", kb=make_kb(9).path)
    assert "clip" not in vars(loaded.retriever.encoder), "the CLIP was loaded"


def test_the_controls_replace_its_images(model, text_ids):
    ids = text_ids(TEXTS[0])["input_ids"]
    own, expected = model.retriever, model(ids).logits
    try:
        switch_images(model, "random")
        assert (model(ids).logits - expected).abs().max() > 1e-2
        arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        assert model.generate(ids, **arguments).equal(model.generate(ids, **arguments, use_cache=False))
        model.set_retriever(own)
        switch_images(model, "off")
        assert (model(ids).logits - expected).abs().max() > 1e-2
    finally:
        model.set_retriever(own)


def test_another_clip_and_a_model_without_a_head_are_refused(model, clip, kb, text_ids, tmp_path):
    other = make_clip(clip.tokenizer, seed=1)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(pictures / f"{number}.png")
    foreign = build(FolderSource(pictures), tmp_path / "kb", other, progress=False)
    save_checkpoint(model, clip.tokenizer, tmp_path / "model")
    with pytest.raises(ValmError, match=r"query head was trained for the CLIP with weights .*valm distill"):
        load(tmp_path / "model", kb=foreign.path)
    plain = tiny_model(image_dim=kb.dim)
    with pytest.raises(ValmError, match="needs a VaLM with a query head: train one with `valm distill`"):
        SelfRetriever(SelfEncoder(plain, clip.tokenizer, kb), kb, 3)
    with pytest.raises(ValmError, match="needs a query head"):
        plain.self_queries(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValmError, match="a query head needs retrieved images"):
        ValmConfig(num_images=0, query_clip="00")
