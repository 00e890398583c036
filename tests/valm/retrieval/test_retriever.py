import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from tests.tolerance import UNIT_VECTORS
from tests.valm.other_tokenizers import gpt2_like
from tests.valm.retrieval.test_alignment import left_padded
from tests.valm.store.manifests import edit_manifest
from tests.valm.tiny_clip import TEXTS, make_clip
from valm.clip.tokenizer import padded, prompt_ids
from valm.errors import ValmError
from valm.knowledge_base.build import build
from valm.knowledge_base.sources.folder import FolderSource
from valm.retrieval.context import ContextEncoder
from valm.retrieval.ray_index import _Rows
from valm.retrieval.retriever import BlindRetriever, Retriever, SegmentCache
from valm_kernels import FlatIPIndex

K = 3


@pytest.fixture(scope="module")
def retriever(clip, make_kb):
    return Retriever(ContextEncoder(clip), make_kb(30), K)


@pytest.fixture(scope="module", params=["CLIP's tokenizer", "another tokenizer"])
def exact_retriever(clip, make_kb, request):
    """In float64, so that a segment encoded in another batch differs in the last rounding only."""
    tokenizer = None if request.param == "CLIP's tokenizer" else gpt2_like()
    encoder = ContextEncoder(clip, tokenizer=tokenizer, dtype=torch.float64)
    return Retriever(encoder, make_kb(30), K, cache_tokens=200)


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Two texts, the shorter one padded on the left."""
    ids, mask = left_padded([tokenizer(text)["input_ids"] for text in TEXTS])
    assert not mask.all()
    return ids, mask


def note_segments(encoder, monkeypatch):
    """The keys of the segments that `encoder` encodes from now on."""
    encode, keys = encoder.encode, []

    def noted(runs, shape):
        keys.extend(run.key() for run in runs)
        return encode(runs, shape)

    monkeypatch.setattr(encoder, "encode", noted)
    return keys


def test_the_pictures_are_the_nearest(retriever, batch):
    ids, mask = batch
    found = retriever(ids, mask)
    scores = retriever.encoder(ids, mask).double() @ torch.from_numpy(retriever.kb.vectors()).double().T  # (B, T, N)
    expected = scores.topk(K)
    real = retriever.encoder(ids, mask).any(-1)
    assert real.sum() == mask.sum() - len(ids)  # without the first tokens
    global_ids = found.image_ids[found.image_index]
    assert torch.equal(global_ids[real], expected.indices[real])
    assert torch.allclose(found.scores[real].double(), expected.values[real], rtol=0, atol=UNIT_VECTORS)


def test_padding_has_no_pictures(retriever, batch):
    ids, mask = batch
    found = retriever(ids, mask)
    assert (found.image_index[mask == 0] == -1).all()
    assert (found.scores[mask == 0] == -torch.inf).all()
    nothing = retriever(ids, torch.zeros_like(mask))
    assert nothing.image_pool.shape == (0, retriever.dim)
    assert (nothing.image_index == -1).all()


def test_the_pool_has_each_picture_once(retriever, batch):
    found = retriever(*batch)
    assert found.image_pool.dtype == torch.float32
    assert len(found.image_ids.unique()) == len(found.image_ids) < found.image_index.numel()
    assert set(found.image_index.unique().tolist()) == set(range(-1, len(found.image_ids)))
    assert np.array_equal(found.image_pool.numpy(), retriever.kb.gather(found.image_ids.numpy()).astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_cache_changes_nothing(exact_retriever, data):
    """Batches of repeated and new texts, one after the other: as if each token were encoded and searched for alone."""
    tokenizer = exact_retriever.encoder.tokenizer
    words = tokenizer("red apple lies on the wooden table. sky blue! dogs run; yellow bus.")["input_ids"]
    text = st.lists(st.sampled_from([*words, tokenizer.bos_token_id, tokenizer.eos_token_id]), min_size=1, max_size=60)
    texts = data.draw(st.lists(text, min_size=1, max_size=3))
    ids, mask = padded(data.draw(st.lists(st.sampled_from(texts), min_size=1, max_size=4)))
    cache = exact_retriever.cache
    served = cache.hits + cache.misses
    found_ids, found_scores = exact_retriever.find(ids, mask)
    queries = exact_retriever.encoder(ids, mask)
    expected_ids, expected_scores = exact_retriever.nearest(queries)
    assert torch.equal(found_ids, expected_ids)
    assert torch.allclose(found_scores, expected_scores, rtol=0, atol=UNIT_VECTORS)
    assert cache.hits + cache.misses - served == queries.any(-1).sum()
    assert cache.tokens <= cache.capacity


@pytest.mark.parametrize("cache_tokens", [1000, 0])
def test_equal_segments_are_encoded_once(retriever, batch, monkeypatch, cache_tokens):
    ids, mask = batch
    counting = Retriever(retriever.encoder, retriever.kb, K, cache_tokens=cache_tokens)
    encoded = note_segments(counting.encoder, monkeypatch)
    once = counting(ids, mask)
    segments = len(encoded)
    assert segments == len(set(encoded)) and counting.cache.hit_rate == 0
    twice = counting(ids.repeat(2, 1), mask.repeat(2, 1))
    assert len(encoded) == (segments if cache_tokens else 2 * segments)
    assert counting.cache.hit_rate == pytest.approx(2 / 3 if cache_tokens else 1 / 3)
    for row in (0, 1):
        assert torch.equal(twice.image_index[2 * row : 2 * row + 2], once.image_index)


def test_the_oldest_segments_are_forgotten():
    cache = SegmentCache(capacity=5)
    segments = {key: (torch.full((2, K), number), torch.zeros(2, K)) for number, key in enumerate((b"a", b"b", b"c"))}
    cache.put(b"a", segments[b"a"])
    cache.put(b"b", segments[b"b"])
    assert cache.get(b"a") is segments[b"a"]
    cache.put(b"c", segments[b"c"])  # b is the one that was not asked for
    assert cache.get(b"b") is None and cache.get(b"c") is segments[b"c"] and cache.tokens == 4


def test_texts_are_read_with_the_encoders_tokenizer(exact_retriever):
    tokenizer = exact_retriever.encoder.tokenizer
    found_ids, found_scores = exact_retriever.find(TEXTS)
    rows = [prompt_ids(tokenizer, text) for text in TEXTS]  # as in training
    assert found_ids.shape == (2, max(map(len, rows)), K) and len(rows[0]) < len(rows[1])
    for row, ids in enumerate(rows):
        expected_ids, expected_scores = exact_retriever.find(torch.tensor([ids]))
        assert torch.equal(found_ids[row, : len(ids)], expected_ids[0])
        assert torch.allclose(found_scores[row, : len(ids)], expected_scores[0], rtol=0, atol=UNIT_VECTORS)
        assert (found_ids[row, len(ids) :] == -1).all()
    assert torch.equal(exact_retriever(TEXTS).scores, found_scores)
    with pytest.raises(ValueError, match=r"got a text: give \['a red apple lies on '\]"):
        exact_retriever(TEXTS[0])


def test_step_by_step(retriever, batch):
    ids, mask = batch
    whole = retriever(ids, mask)
    state = retriever.start(len(ids))
    for at in [slice(0, 9), *(slice(n, n + 1) for n in range(9, 14))]:
        found = retriever.step(ids[:, at], state, mask[:, at])
        for row, column in mask[:, at].nonzero().tolist():
            pictures = found.image_ids[found.image_index[row, column]]
            assert torch.equal(pictures, whole.image_ids[whole.image_index[row, at.start + column]])
    state.reorder(torch.tensor([1, 0]))
    found = retriever.step(ids[[1, 0], 14:15], state)
    assert torch.equal(found.image_ids[found.image_index[:, 0]], whole.image_ids[whole.image_index[[1, 0], 14]])


@pytest.mark.parametrize("tokenizer_of_model", [None, gpt2_like])
def test_a_conversation_reads_each_segment_once(clip, make_kb, monkeypatch, tokenizer_of_model):
    """And what it finds is, bit by bit, what it finds without a cache."""
    encoder = ContextEncoder(clip, tokenizer=tokenizer_of_model and tokenizer_of_model())
    cached, uncached = (Retriever(encoder, make_kb(30), K, cache_tokens=tokens) for tokens in (200, 0))
    read = []
    turns = [prompt_ids(encoder.tokenizer, " ".join([*TEXTS, *TEXTS][:n])) for n in (1, 2, 4)]
    assert turns[1][: len(turns[0])] == turns[0]
    for ids in turns:
        prompt = torch.tensor([ids])
        with monkeypatch.context() as patched:
            keys = note_segments(encoder, patched)
            found = cached.step(prompt, cached.start(1))
        read += keys
        expected = uncached.step(prompt, uncached.start(1))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        whole = uncached(prompt)
        assert torch.equal(found.image_ids[found.image_index], whole.image_ids[whole.image_index])
    assert len(read) == len(set(read)) >= 4
    assert cached.cache.hits > 0 and 0 < cached.cache.tokens <= 200


def test_a_prompt_and_what_follows_it(exact_retriever):
    """The prompt's open segment goes on in later steps, also where its other segments were cached."""
    ids = torch.tensor([prompt_ids(exact_retriever.encoder.tokenizer, " ".join(TEXTS))])
    whole_ids, whole_scores = exact_retriever.find(ids)
    for _ in range(2):
        state = exact_retriever.start(1)
        steps = [slice(0, 30), *(slice(n, n + 1) for n in range(30, ids.shape[1]))]
        for at in steps:
            found = exact_retriever.step(ids[:, at], state)
            assert torch.allclose(found.scores, whole_scores[:, at], rtol=0, atol=UNIT_VECTORS)
            seen = found.image_index >= 0
            assert torch.equal(found.image_ids[found.image_index[seen]], whole_ids[:, at][seen])


def test_search(retriever, clip):
    results = retriever.search("a red apple", 5)
    scores = clip.encode_texts(["a red apple"])[0].double() @ torch.from_numpy(retriever.kb.vectors()).double().T
    assert [item.id for _, item in results] == scores.topk(5).indices.tolist()
    assert [score for score, _ in results] == sorted((score for score, _ in results), reverse=True)
    assert results[0][1] == retriever.kb.item(results[0][1].id)
    assert len(retriever.search("a", 1000)) == len(retriever.kb)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "turned"])
def test_an_image_is_read_as_the_knowledge_base_reads_it(clip, tmp_path, mode):
    """On white where it is transparent, with all grey levels, and upright."""
    square = np.zeros((32, 32, 4), np.uint8)
    square[8:24, 4:12] = 255, 0, 0, 255
    image, options = Image.fromarray(square, "RGBA"), {}
    if mode == "I;16":
        image = Image.fromarray((square[..., 0].astype(np.uint16) + 1) * 100)
    if mode == "turned":
        image = image.convert("RGB")
        exif = image.getexif()
        exif[ExifTags.Base.Orientation] = 6
        options = {"exif": exif}
    image.save(tmp_path / "it.png", **options)
    for name, colour in (("black", 0), ("white", 255)):
        Image.new("L", (32, 32), colour).save(tmp_path / f"{name}.png")
    kb = build(FolderSource(tmp_path), tmp_path / "kb", clip, progress=False)
    own = Retriever(ContextEncoder(clip), kb, 1)
    with Image.open(tmp_path / "it.png") as opened:
        (score, item), *_ = own.search(opened, 3)
    assert item.uri == "it.png" and score == pytest.approx(1, abs=2e-3)


def test_autocast_changes_no_query(clip, make_kb, batch):
    """It would be cached, and found later without."""
    fresh = [Retriever(ContextEncoder(clip), make_kb(30), K) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        under = [fresh[0].find(*batch), fresh[0].step(batch[0], fresh[0].start(2), batch[1])]
        images = clip.encode_images([Image.new("RGB", (32, 32), "red")])
        texts = clip.encode_texts(["a red apple"])
    for ids, scores in (under[0], fresh[0].find(*batch)):
        expected = fresh[1].find(*batch)
        assert torch.equal(ids, expected[0]) and torch.equal(scores, expected[1])
    assert torch.equal(under[1].scores, fresh[1].step(batch[0], fresh[1].start(2), batch[1]).scores)
    assert torch.equal(images, clip.encode_images([Image.new("RGB", (32, 32), "red")]))
    assert torch.equal(texts, clip.encode_texts(["a red apple"]))


def test_an_actor_that_is_started_again_searches_the_same_vectors(clip, make_kb):
    kb = make_kb(5)
    handed_on = pickle.dumps(kb)
    rows = _Rows(pickle.loads(handed_on), 1, 4)
    assert len(rows.index) == 3
    edit_manifest(kb.path, normalized=False)
    with pytest.raises(ValmError, match="has changed since another process opened it"):
        _Rows(pickle.loads(handed_on), 1, 4)


def test_an_index_of_another_knowledge_base_is_refused(retriever, make_kb):
    index = FlatIPIndex(retriever.kb.vectors())
    index.kb = make_kb(31)
    with pytest.raises(ValmError, match=r"the index belongs to the knowledge base .*, not to "):
        Retriever(retriever.encoder, retriever.kb, K, index)
    with pytest.raises(ValmError, match=r"the index has 20 vectors, but the knowledge base .* 30"):
        Retriever(retriever.encoder, retriever.kb, K, FlatIPIndex(retriever.kb.vectors()[:20]))


def test_what_does_not_fit_is_refused(retriever, tokenizer, monkeypatch):
    for k in (0, 31):
        with pytest.raises(ValmError, match=rf"k must be from 1 to the 30 images of .*, got {k}"):
            Retriever(retriever.encoder, retriever.kb, k)
    with pytest.raises(ValmError, match="k must be from 1"):
        retriever.search("a", 0)
    monkeypatch.setattr("valm.retrieval.retriever.MAX_TOPK", 5)
    for k in (6, 100_000):
        with pytest.raises(ValmError, match=f"k must be from 1 to 5, got {k:,}: a search returns no more of the 30"):
            retriever.search("a", k)
    with pytest.raises(ValmError, match="was built with the CLIP tiny"):
        Retriever(ContextEncoder(make_clip(tokenizer, seed=1)), retriever.kb, K)


def test_the_blind_retriever_gives_each_token_its_query(clip, batch):
    ids, mask = batch
    # in float64, so that token by token and all at once differ in the last rounding only
    blind = BlindRetriever(ContextEncoder(clip, dtype=torch.float64))
    queries = blind.encoder(ids, mask)
    found = blind(ids, mask)
    real = queries.any(-1)
    assert torch.equal(found.image_pool[found.image_index[..., 0]][real], queries[real])
    assert (found.image_index[~real] == -1).all() and (found.scores[~real] == -torch.inf).all()
    assert len(found.image_pool) == int(mask.sum()) - len(ids)  # without the first tokens
    assert (found.image_ids == -1).all()
    state = blind.start(2)
    steps = [blind.step(ids[:, i : i + 1], state, mask[:, i : i + 1]) for i in range(ids.shape[1])]
    stepped = torch.cat([step.image_pool for step in steps])
    by_step = queries.transpose(0, 1)[real.T]  # the order in which single steps come
    torch.testing.assert_close(stepped, by_step)


def test_a_blind_retriever_has_the_scores_of_the_images_that_it_hides(clip, make_kb, batch):
    ids, mask = batch
    encoder, kb = ContextEncoder(clip, dtype=torch.float64), make_kb(30)
    seeing = Retriever(encoder, kb, 3)(ids, mask)
    for blind in (BlindRetriever(encoder, kb=kb), BlindRetriever(encoder, 100, kb)):
        found = blind(ids, mask)
        torch.testing.assert_close(found.scores[..., 0], seeing.scores[..., 0])
        assert torch.equal(found.image_index[..., 0] < 0, seeing.image_index[..., 0] < 0)
        state = blind.start(2)
        steps = [blind.step(ids[:, i : i + 1], state, mask[:, i : i + 1]).scores for i in range(ids.shape[1])]
        torch.testing.assert_close(torch.cat(steps, 1), found.scores)


def test_a_blind_retriever_encodes_a_row_that_it_keeps_once(clip, batch, monkeypatch):
    ids, mask = batch
    blind = BlindRetriever(ContextEncoder(clip), cache_tokens=int(mask[0].sum()) + 1)  # room for the first row
    expected = BlindRetriever(blind.encoder)(ids, mask)
    encoded = []
    encode = ContextEncoder.__call__
    monkeypatch.setattr(
        ContextEncoder, "__call__", lambda self, ids, mask: encoded.append(len(ids)) or encode(self, ids, mask)
    )
    for _ in range(2):
        torch.testing.assert_close(blind(ids, mask).image_pool, expected.image_pool)
    blind(ids[:1], mask[:1])
    assert encoded == [len(ids), len(ids) - 1]
    wider = torch.nn.functional.pad(ids[:1], (0, 2)), torch.nn.functional.pad(mask[:1], (0, 2))
    found = blind(*wider)
    assert (found.image_index[0, -2:] == -1).all()
    torch.testing.assert_close(found.image_pool, expected.image_pool[: len(found.image_pool)])
    with pytest.raises(ValueError, match="attention_mask must have the shape"):
        blind(ids, mask[:, :-1])
