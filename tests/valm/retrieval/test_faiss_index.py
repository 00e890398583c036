import dataclasses
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from tests.valm.models import tiny_model
from tests.valm.retrieval.indexed import K, make_index, make_indexed, make_kb_of_directions, queries, slow
from tests.valm.store.manifests import check_every_bit_counts, edit_manifest
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import ContextEncoder
from valm.retrieval.faiss_index import FaissIndex, open_index, remove_index, verify_index
from valm.retrieval.index_parameters import import_faiss, index_parameters
from valm.retrieval.retriever import Retriever
from valm_kernels import FlatIPIndex

pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")


@pytest.fixture(scope="module")
def indexed(clip, tmp_path_factory):
    """A knowledge base with an index that looks into part of it."""
    return make_indexed(clip, tmp_path_factory.mktemp("indexed"), target_recall=0.8, factory="IVF100,Flat")


@pytest.fixture
def copied(indexed, tmp_path):
    shutil.copytree(indexed.path, tmp_path / "kb")
    return ImageKnowledgeBase.open(tmp_path / "kb")


def narrow(kb, search, candidates):
    """The index of `kb`, searched so and comparing so many candidates."""
    opened = FaissIndex.open(kb)
    parameters = dataclasses.replace(opened.parameters, search=search, candidates=candidates)
    return FaissIndex(kb, opened._index, parameters)


def test_scores_are_exact_and_in_order(indexed):
    asked = queries(indexed, 50, seed=3).reshape(5, 10, indexed.dim)
    scores, ids = FaissIndex.open(indexed).search(asked, K)
    expected = (asked[:, :, None].double() * torch.from_numpy(indexed.vectors()).double()[ids]).sum(-1)
    assert scores.shape == ids.shape == (5, 10, K)
    assert torch.equal(scores, expected.float())
    assert (scores[..., :-1] >= scores[..., 1:]).all()
    assert FaissIndex.open(indexed).search(asked[:0], K).indices.shape == (0, 10, K)


def test_all_cells_find_what_exact_search_finds(indexed):
    asked = queries(indexed, seed=4)
    found = narrow(indexed, "nprobe=100", candidates=64).search(asked, K)
    assert all(map(torch.equal, found, FlatIPIndex(indexed.vectors()).search(asked, K)))


def test_equal_pictures_come_in_the_order_of_their_ids(clip, tmp_path):
    """Fifty of each: those with the lowest ids, as from exact search."""
    kb = make_kb_of_directions(clip, tmp_path / "kb", copies=50)
    make_index(kb, queries(kb), "Flat", target_recall=0)
    asked = queries(kb, seed=4)
    found = narrow(kb, "", candidates=32).search(asked, K)
    assert all(map(torch.equal, found, FlatIPIndex(kb.vectors()).search(asked, K)))


def test_missing_hits_are_none(indexed):
    """A cell with fewer pictures than asked for: -1, never another picture."""
    scores, ids = narrow(indexed, "nprobe=1", candidates=1).search(queries(indexed, 20), 500)
    assert (ids == -1).any(1).all() and (ids >= 0).any(1).all()
    assert (scores[ids == -1] == -torch.inf).all() and scores[ids >= 0].isfinite().all()
    assert all(len(row[row >= 0].unique()) == (row >= 0).sum() for row in ids)


@pytest.mark.parametrize("search", ["nprobe=1", "nprobe=100"])
def test_a_query_that_is_not_finite_has_no_pictures(indexed, search):
    asked = queries(indexed, 4)
    index = narrow(indexed, search, candidates=4)
    clean = index.search(asked, K)
    asked[1, 3], asked[2, 0] = torch.nan, torch.inf
    scores, ids = index.search(asked, K)
    assert scores[1:3].isnan().all() and (ids[1:3] == -1).all()
    assert torch.equal(scores[[0, 3]], clean.scores[[0, 3]]) and torch.equal(ids[[0, 3]], clean.indices[[0, 3]])


@pytest.mark.parametrize(
    "factory",
    ["PCA16,IVF60,PQ16x4fs", slow("OPQ8,IVF60,PQ8x4fs"), "IVF60_HNSW8,PQ16x4fs", slow("IVF60,PQ8np"), "PCA16,SQ8"],
)
def test_candidates_are_those_that_faiss_finds(clip, tmp_path, factory):
    """Whoever chooses the cells of an inverted file."""
    kb = make_indexed(clip, tmp_path / "kb", factory=factory, target_recall=0)
    for search in ["nprobe=7", "nprobe=60"] if "IVF" in factory else [""]:
        index = narrow(kb, search, candidates=3)
        asked = queries(kb, 50, seed=5).numpy()
        found = index._find(asked, 3 * K)
        expected = index._index.search(asked, 3 * K)[1]
        assert (np.sort(found) == np.sort(expected)).mean() > 0.99  # but for cells and codes equally far away


def test_cells_of_4_bit_codes(clip, tmp_path):
    """More than there are is all of them, and they are chosen in full precision also under autocast."""
    kb = make_indexed(clip, tmp_path / "kb", factory="IVF60,PQ16x4fs", target_recall=0)
    asked = queries(kb, 200, seed=5)
    more, every, some = (narrow(kb, f"nprobe={cells}", candidates=3) for cells in (1000, 60, 5))
    assert torch.equal(more.search(asked, K).indices, every.search(asked, K).indices)
    expected = some.search(asked, K)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, some.search(asked, K), expected))


def test_a_search_by_text_leaves_missing_hits_out(indexed, clip):
    index = narrow(indexed, "nprobe=1", candidates=1)
    ids = index.search(clip.encode_texts(["a red apple"]), 100).indices[0]
    results = Retriever(ContextEncoder(clip), indexed, K, index).search("a red apple", 100)
    assert 0 < len(results) < 100
    assert [item.id for _, item in results] == ids[ids >= 0].tolist()


def test_the_model_sees_nothing_in_place_of_a_missing_hit(indexed, clip, tokenizer):
    k = 40  # more than many cells have
    ids = torch.tensor([tokenizer("a red apple lies on the wooden table.")["input_ids"]])
    retriever = Retriever(ContextEncoder(clip), indexed, k, narrow(indexed, "nprobe=1", candidates=1))
    found = retriever(ids)
    missing = found.image_index == -1
    assert missing[:, 1:].any() and not missing[:, 1:].all(-1).any()  # the first token has none
    assert len(found.image_pool) == len(found.image_ids) and (found.image_ids >= 0).all()
    model = tiny_model(vocab_size=len(tokenizer), image_dim=indexed.dim, num_images=k)
    _, weights = model.fusion_attention(ids, found.image_pool, found.image_index)  # (B, H, T, K)
    for head in weights.unbind(1):
        assert (head[missing] == 0).all() and (head[~missing] > 0).all()
    model.set_retriever(retriever)
    logits = model(ids).logits
    # the same pictures in other slots, and none among them: the same answer
    reordered = model(ids, image_pool=found.image_pool, image_index=found.image_index.flip(-1)).logits
    torch.testing.assert_close(reordered, logits)
    filled = model(ids, image_pool=found.image_pool, image_index=found.image_index.clamp(min=0)).logits
    assert not torch.allclose(filled, logits)


def test_an_image_that_is_not_there_is_damage(indexed, monkeypatch):
    """As 4-bit codes find them whose bytes were changed."""
    index = FaissIndex.open(indexed)
    monkeypatch.setattr(index, "_find", lambda queries, count: np.full((len(queries), count), 1 << 40))
    with pytest.raises(ValmError, match=r"index\.faiss is damaged: it finds image \d+; .*valm kb index"):
        index.search(torch.randn(2, indexed.dim), 3)


def test_exact_search_of_many_pictures_names_what_makes_an_index(copied, monkeypatch, recwarn):
    monkeypatch.setattr("valm.retrieval.faiss_index.EXACT_BELOW", len(copied))
    assert isinstance(open_index(copied), FaissIndex)
    remove_index(copied)
    assert not list(copied.path.glob("index.*"))
    with pytest.warns(UserWarning, match=rf"all its 3,000 vectors .* `valm kb index {copied.path}` makes an index"):
        assert isinstance(open_index(copied), FlatIPIndex)
    monkeypatch.setattr("valm.retrieval.faiss_index.EXACT_BELOW", len(copied) + 1)
    open_index(copied)
    assert not recwarn.list


def test_damage_is_named_with_its_remedy(copied):
    file, parameters = copied.path / "index.faiss", copied.path / "index.json"
    content = file.read_bytes()
    remedy = rf"`valm kb index {copied.path}`, or delete index\.json to search exactly"

    def refused(match):
        with pytest.raises(ValmError, match=f"{match}.*{remedy}"):
            open_index(copied)

    assert verify_index(copied) == []
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert verify_index(copied) == ["index.faiss"]
    file.write_bytes(content[:1000])
    refused(rf"index\.faiss is damaged: it has 1000 bytes instead of {len(content)}")
    file.write_bytes(bytes(len(content)))
    refused(r"cannot read .*index\.faiss")
    file.unlink()
    refused(r"index\.faiss is damaged: it is missing")
    edit_manifest(copied.path, "index.json", knowledge_base="another")
    refused("was made for another state of the knowledge base")
    parameters.write_text(json.dumps({"factory": "Flat"}))
    refused(r"index\.json is damaged")
    remove_index(copied)
    assert index_parameters(copied) is None and verify_index(copied) == []
    with pytest.raises(ValmError, match=r"has no index: index\.json is missing"):
        FaissIndex.open(copied)


def test_parameters_with_one_changed_bit_are_refused(copied):
    check_every_bit_counts(copied.path / "index.json", lambda: index_parameters(copied), 1000)


@pytest.mark.parametrize(
    ("amx", "chosen", "used"),
    [(True, None, "SkylakeX"), (True, "Haswell", "Haswell"), (False, None, None)],
)
def test_faiss_multiplies_with_avx512_on_a_processor_with_amx(amx, chosen, used, monkeypatch, tmp_path):
    """The OpenBLAS of its wheels does not know the newest. A faiss that records what OpenBLAS would read stands in."""
    name = "OPENBLAS_CORETYPE"
    (tmp_path / "faiss.py").write_text(f"import os\ncore = os.environ.get({name!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faiss")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(name, chosen)
    assert import_faiss().core == used
    assert os.environ.get(name) == chosen  # OpenBLAS elsewhere chooses by itself
