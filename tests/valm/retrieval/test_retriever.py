import numpy as np
import pytest
import torch

from tests.valm.retrieval.tiny_clip import TEXTS, make_clip
from valm.errors import ValmError
from valm.retrieval.context import ContextEncoder
from valm.retrieval.retriever import BlindRetriever, Retriever

K = 3


@pytest.fixture(scope="module")
def retriever(clip, make_kb):
    return Retriever(ContextEncoder(clip), make_kb(30), K)


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Two texts, the shorter one padded on the left."""
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    length = max(map(len, rows))
    ids = torch.tensor([[5] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    assert not mask.all()
    return ids, mask


def test_the_pictures_are_the_nearest(retriever, batch):
    ids, mask = batch
    found = retriever(ids, mask)
    scores = retriever.encoder(ids, mask).double() @ torch.from_numpy(retriever.kb.vectors()).double().T  # (B, T, N)
    expected = scores.topk(K)
    real = mask.bool()
    global_ids = found.image_ids[found.image_index]
    assert torch.equal(global_ids[real], expected.indices[real])
    assert torch.allclose(found.scores[real].double(), expected.values[real], rtol=0, atol=2**-22)


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


def test_search(retriever, clip):
    results = retriever.search("a red apple", 5)
    scores = clip.encode_texts(["a red apple"])[0].double() @ torch.from_numpy(retriever.kb.vectors()).double().T
    assert [item.id for _, item in results] == scores.topk(5).indices.tolist()
    assert [score for score, _ in results] == sorted((score for score, _ in results), reverse=True)
    assert results[0][1] == retriever.kb.item(results[0][1].id)
    assert len(retriever.search("a", 1000)) == len(retriever.kb)


def test_what_does_not_fit_is_refused(retriever, tokenizer, monkeypatch):
    with pytest.raises(ValmError, match=r"k must be from 1 to the 30 pictures of .*, got 31"):
        Retriever(retriever.encoder, retriever.kb, 31)
    with pytest.raises(ValmError, match="k must be from 1"):
        Retriever(retriever.encoder, retriever.kb, 0)
    with pytest.raises(ValmError, match="k must be from 1"):
        retriever.search("a", 0)
    monkeypatch.setattr("valm.retrieval.retriever.MAX_K", 5)
    with pytest.raises(ValmError, match="k must be from 1 to 5, got 6"):
        retriever.search("a", 6)
    with pytest.raises(ValmError, match="was built with the CLIP tiny"):
        Retriever(ContextEncoder(make_clip(tokenizer, seed=1)), retriever.kb, K)


def test_the_blind_retriever_gives_each_token_its_query(clip, batch):
    ids, mask = batch
    # in float64, so that token by token and all at once differ in the last rounding only
    blind = BlindRetriever(ContextEncoder(clip, dtype=torch.float64))
    queries = blind.encoder(ids, mask)
    found = blind(ids, mask)
    real = mask.bool()
    assert torch.equal(found.image_pool[found.image_index[..., 0]][real], queries[real])
    assert (found.image_index[~real] == -1).all() and (found.scores[~real] == -torch.inf).all()
    assert len(found.image_pool) == int(mask.sum())
    assert (found.image_ids == -1).all()
    state = blind.start(2)
    steps = [blind.step(ids[:, i : i + 1], state, mask[:, i : i + 1]) for i in range(ids.shape[1])]
    stepped = torch.cat([step.image_pool for step in steps])
    by_step = queries.transpose(0, 1)[real.T]  # the order in which single steps come
    torch.testing.assert_close(stepped, by_step)
