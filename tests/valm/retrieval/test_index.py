import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from valm.errors import ValmError
from valm.retrieval.context import ContextEncoder
from valm.retrieval.index import FaissIndex, build_index, choose_factory, recall
from valm.retrieval.knowledge_base import ImageKnowledgeBase
from valm.retrieval.retriever import Retriever
from valm.retrieval.sharded_build import ShardedBuild
from valm.retrieval.shards import ITEM_SCHEMA, WHAT, Piece, clip_entry, finish_knowledge_base, write_piece
from valm_kernels import FlatIPIndex

pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")
COUNT, K = 3000, 4


def random_directions(count, dim, seed, centres=40):
    """Unit vectors around some centres, as pictures of like things are."""
    generator = np.random.default_rng(seed)
    middle = np.random.default_rng(99).normal(size=(centres, dim))
    rows = middle[generator.integers(0, centres, count)] + 0.7 * generator.normal(size=(count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def kb(clip, tmp_path):
    build = ShardedBuild(tmp_path / "kb", WHAT, {})
    vectors = random_directions(COUNT, clip.embed_dim, seed=0)
    for start in range(0, COUNT, 1000):
        items = [{"uri": str(row), "caption": "", "width": 1, "height": 1} for row in range(start, start + 1000)]
        piece = Piece(vectors[start : start + 1000], pa.Table.from_pylist(items, ITEM_SCHEMA), None, [])
        write_piece(build.out, start // 1000, piece)
    finish_knowledge_base(build, clip_entry(clip, build.out), clip.embed_dim)
    return ImageKnowledgeBase.open(build.out)


def queries(kb, count=400, seed=1):
    return torch.from_numpy(random_directions(count, kb.dim, seed)).float()


@pytest.mark.parametrize("factory", [None, "IVF32,Flat", "IVF16,PQ8x4"])
def test_the_target_recall_is_reached_and_told(kb, factory):
    index = build_index(kb, queries(kb), k=K, target_recall=0.9, factory=factory)
    asked = queries(kb, seed=2)
    found = index.search(asked, K)
    reached = recall(found.indices, FlatIPIndex(kb.vectors()).search(asked, K).indices)
    # 1,600 pictures each were looked for: two standard deviations of a share near 0.9 are 0.015
    assert reached > 0.9 - 0.03
    assert abs(index.parameters.recall - reached) < 0.03
    assert index.parameters.queries == 200


def test_scores_are_exact_and_in_order(kb):
    index = build_index(kb, queries(kb), k=K)
    asked = queries(kb, 50, seed=3).reshape(5, 10, kb.dim)
    scores, ids = index.search(asked, K)
    expected = (asked[:, :, None].double() * torch.from_numpy(kb.vectors()).double()[ids]).sum(-1)
    assert scores.shape == ids.shape == (5, 10, K)
    assert torch.allclose(scores.double(), expected, rtol=0, atol=2**-24)
    assert (scores[..., :-1] >= scores[..., 1:]).all()
    assert index.search(asked[:0], K).indices.shape == (0, 10, K)


def test_all_cells_find_what_exact_search_finds(kb):
    index = build_index(kb, queries(kb), k=K, target_recall=1.0, factory="IVF8,Flat", candidates=64)
    asked = queries(kb, seed=4)
    exhaustive = dataclasses.replace(index.parameters, nprobe=8)
    index._index.nprobe = exhaustive.nprobe
    assert torch.equal(index.search(asked, K).indices, FlatIPIndex(kb.vectors()).search(asked, K).indices)


def test_missing_hits_are_none(kb):
    """A cell with fewer pictures than asked for: -1, never another picture."""
    index = build_index(kb, queries(kb), k=1, target_recall=0.1, factory="IVF200,Flat", candidates=1)
    assert index.parameters.nprobe == 1
    scores, ids = index.search(queries(kb, 20), 100)
    assert (ids == -1).any(1).all()
    assert (scores[ids == -1] == -torch.inf).all()
    assert all(len(row[row >= 0].unique()) == (row >= 0).sum() for row in ids)


def test_opened_again_and_given_to_a_retriever(kb, clip, tokenizer):
    built = build_index(kb, queries(kb), k=K)
    opened = FaissIndex.open(kb)
    assert opened.parameters == built.parameters
    assert len(opened) == COUNT
    ids = torch.tensor([tokenizer("a red apple lies on the wooden table.")["input_ids"]])
    approximate = Retriever(ContextEncoder(clip), kb, K, opened)(ids)
    exact = Retriever(ContextEncoder(clip), kb, K)(ids)
    assert approximate.image_index.shape == exact.image_index.shape
    same = approximate.image_ids[approximate.image_index] == exact.image_ids[exact.image_index]
    assert same[approximate.scores == exact.scores].any()


def test_wrong_indexes(kb):
    with pytest.raises(ValmError, match=r"has no index: it has no index\.json"):
        FaissIndex.open(kb)
    with pytest.raises(ValmError, match="needs queries to be tuned and measured on, got 1"):
        build_index(kb, queries(kb, 1))
    with pytest.raises(ValmError, match=r"finds 0\.\d+ of the 4 nearest with all its cells, less than the 0\.99"):
        build_index(kb, queries(kb), factory="IVF16,PQ1x4", target_recall=0.99, candidates=1)
    assert not (kb.path / "index.json").exists()
    build_index(kb, queries(kb), target_recall=0.5)
    content = json.loads((kb.path / "index.json").read_text())
    (kb.path / "index.json").write_text(json.dumps({**content, "knowledge_base": "another"}))
    with pytest.raises(ValmError, match="is of another knowledge base"):
        FaissIndex.open(kb)
    (kb.path / "index.json").write_text(json.dumps({"nprobe": 1}))
    with pytest.raises(ValmError, match="is damaged"):
        FaissIndex.open(kb)
    (kb.path / "index.json").write_text(json.dumps(content))
    (kb.path / "index.faiss").write_bytes(b"IxFI")
    with pytest.raises(ValmError, match=r"cannot read .*index\.faiss"):
        FaissIndex.open(kb)


def test_factories_by_size():
    assert choose_factory(3000, 768) == "IVF76,SQ8"
    assert choose_factory(1_000_000, 768) == "IVF4096,SQ8"
    assert choose_factory(200_000_000, 768) == "OPQ64,IVF65536,PQ64"
