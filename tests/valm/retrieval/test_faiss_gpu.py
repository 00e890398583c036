"""faiss on GPUs: on a stand-in that has faiss's limits, and, marked `gpu`, on a card."""

import dataclasses
import pickle
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from tests.threads import THREADS, at_once
from tests.valm.retrieval.indexed import K, make_index, make_kb_of_directions, queries, slow
from valm.cli import main
from valm.errors import ValmError
from valm.retrieval.context import ContextEncoder
from valm.retrieval.faiss_gpu import on_gpus
from valm.retrieval.faiss_index import FaissIndex, open_index
from valm.retrieval.index_parameters import index_parameters, stages
from valm.retrieval.retriever import Retriever

faiss = pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")


MOST = 2048  # cells and candidates of a query, as in faiss 1.15


class OnStandIn:
    """What `index_cpu_to_gpus_list` returns: searches on the CPU, but never more than faiss's GPUs can."""

    def __init__(self, index, options, gpus):
        if isinstance(stages(index)[1], faiss.IndexIVFPQFastScan | faiss.IndexHNSW):
            raise RuntimeError("Error in ToGpuCloner\nError: 'false' failed: index type not supported")
        self.index, self.options, self.gpus = index, options, gpus
        self.ntotal, self.searching = index.ntotal, False

    def search(self, queries, count):
        if count > MOST:
            raise RuntimeError("GPU index only supports min/max-K selection up to 2048")
        assert not self.searching, "faiss's GPU indexes do not support searches at once"
        self.searching = True
        try:
            return self.index.search(queries, count)
        finally:
            self.searching = False


class StandInSettings:
    """GpuParameterSpace."""

    def set_index_parameters(self, index, search):
        assert isinstance(index, OnStandIn)
        if int(search.partition("=")[2] or 0) > MOST:
            raise RuntimeError("GPU IVF index only supports nprobe selection up to 2048")
        faiss.ParameterSpace().set_index_parameters(index.index, search)


@pytest.fixture
def two_gpus(monkeypatch):
    """A faiss with two GPUs; the list of what was moved there."""
    moved = []

    def move(index, co, gpus):
        moved.append(OnStandIn(index, co, gpus))
        return moved[-1]

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", SimpleNamespace, raising=False)
    monkeypatch.setattr(faiss, "GpuParameterSpace", StandInSettings, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpus_list", move)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: index)  # finds the cells of training vectors
    return moved


@pytest.fixture
def kb(clip, tmp_path):
    return make_kb_of_directions(clip, tmp_path / "kb", caption="a red apple\nthe blue sky")


def build(kb, factory, **arguments):
    return make_index(kb, queries(kb, 60), factory, target_recall=0.5, **arguments)


def test_one_gpu_or_all_of_them(kb, two_gpus):
    """With float16 tables, in shards, by the rules of faiss's own kernels; and only once in all the tuning."""
    built = build(kb, "PCA8,IVF32,SQ8", device="cuda")
    assert [found.gpus for found in two_gpus] == [[0, 1], [0, 1]]  # for tuning, and as opened
    FaissIndex.open(kb, "cuda:1")
    assert two_gpus[-1].gpus == [1]
    assert all(vars(found.options) == {"useFloat16": True, "use_cuvs": False, "shard": True} for found in two_gpus)
    assert isinstance(built._index, OnStandIn)
    again = pickle.loads(pickle.dumps(built))
    assert again.device == built.device == torch.device("cuda") and two_gpus[-1].gpus == [0, 1]


@pytest.mark.parametrize("factory", ["PCA8,IVF32,SQ8", "IVF32,Flat"])
def test_cells_are_trained_on_gpus(kb, two_gpus, monkeypatch, factory):
    used = []
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: used.append(index) or index)
    build(kb, factory, device="cuda")
    (cells,) = used
    assert (cells.d, cells.ntotal) == (8 if "PCA" in factory else kb.dim, 32)
    assert cells.this.own()  # or its memory would stay until the process ends
    build(kb, factory)
    assert len(used) == 1


def test_candidates_of_a_gpu_are_reranked_like_those_of_the_cpu(kb, two_gpus):
    build(kb, "PCA8,IVF32,SQ8", device="cuda")
    on_gpu, on_cpu = FaissIndex.open(kb, "cuda"), FaissIndex.open(kb)
    asked = queries(kb, 50, seed=3).reshape(5, 10, kb.dim)
    asked[1, 2, 3] = torch.nan
    found, expected = on_gpu.search(asked, K), on_cpu.search(asked, K)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores.nan_to_num(7.0), expected.scores.nan_to_num(7.0))
    assert (found.indices[1, 2] == -1).all() and found.scores[1, 2].isnan().all()
    exact = (asked[:, :, None].double() * torch.from_numpy(kb.vectors()).double()[found.indices]).sum(-1).float()
    here = found.indices >= 0
    assert torch.equal(found.scores[here], exact[here])


def test_searches_on_gpus_go_one_after_the_other(kb, two_gpus):
    build(kb, "PCA8,IVF32,SQ8", device="cuda")
    index, asked = FaissIndex.open(kb, "cuda"), queries(kb, 200, seed=3)
    expected = index.search(asked, K)

    def search():
        for _ in range(10):
            assert all(map(torch.equal, index.search(asked, K), expected))

    at_once(*[search] * THREADS)


@pytest.mark.parametrize("factory", ["PCA8,IVF32,PQ8x4fs", slow("HNSW8")])
def test_what_a_gpu_does_not_hold_is_searched_on_the_cpu(kb, clip, two_gpus, monkeypatch, factory):
    """With a warning, both where it is tuned and where it is searched."""
    said = rf"cannot search the index of {kb.path} on cuda \(.*not supported\), so the CPU searches it\. `valm kb index"
    with pytest.warns(UserWarning, match=said):
        built = build(kb, factory, device="cuda")
    assert built.device == torch.device("cpu") and not two_gpus
    expected = FaissIndex.open(kb).search(queries(kb, 50, seed=3), K)
    monkeypatch.setattr(type(clip), "device", property(lambda self: torch.device("cuda")))
    with pytest.warns(UserWarning, match=said):
        retriever = Retriever(ContextEncoder(clip), kb, K)
    assert all(map(torch.equal, retriever.index.search(queries(kb, 50, seed=3), K), expected))
    assert isinstance(open_index(kb), FaissIndex)


@pytest.mark.parametrize("factory", ["Flat", "IVF32,Flat", "IVF32,SQ8", slow("IVF32,PQ1")])
def test_what_a_gpu_holds(kb, two_gpus, factory):
    built = build(kb, factory, device="cuda")
    assert isinstance(built._index, OnStandIn) and built.search(queries(kb, 3), K).indices.shape == (3, K)


@pytest.mark.parametrize("more", [{"search": f"nprobe={MOST + 1}"}, {"candidates": MOST // K + 1}], ids=str)
def test_more_than_a_gpu_can_is_searched_on_the_cpu(kb, two_gpus, more):
    """Tried when it is opened: later, faiss raises."""
    index = build(kb, "IVF32,Flat", device="cuda")
    wide = dataclasses.replace(index.parameters, **more)
    with pytest.warns(UserWarning, match="so the CPU searches it"):
        assert FaissIndex(kb, two_gpus[0].index, wide, "cuda").device == torch.device("cpu")
    index.use(dataclasses.replace(index.parameters, candidates=16))
    assert index.search(queries(kb, 2), MOST // 16).indices.shape == (2, MOST // 16)
    with pytest.raises(RuntimeError, match="up to 2048"):
        index.search(queries(kb, 2), MOST // 16 + 1)


def test_refined_codes_are_searched_on_the_cpu(two_gpus):
    """faiss moves them without their refinement, and says nothing."""
    index = faiss.IndexIVFPQR(faiss.IndexFlatL2(8), 8, 1, 2, 4, 2, 4)
    with pytest.raises(RuntimeError, match="refined codes"):
        on_gpus(index, torch.device("cuda:0"), "nprobe=1", 4)
    assert two_gpus == []


def test_tuning_ends_where_a_gpu_does(kb, two_gpus, monkeypatch):
    monkeypatch.setattr("tests.valm.retrieval.test_faiss_gpu.MOST", 4 * 32)
    monkeypatch.setattr("valm.retrieval.index_tuning._searches", lambda index: ["nprobe=1", "nprobe=999"])
    with pytest.raises(ValmError, match=r"finds at most 0\.\d+ .* The target 1.* needs finer codes"):
        make_index(kb, queries(kb, 60), "IVF32,SQ8", target_recall=1, device="cuda")


def test_a_faiss_without_gpus_searches_on_the_cpu(kb):
    build(kb, "IVF32,Flat")
    assert open_index(kb, "cuda").device == torch.device("cpu")
    with pytest.raises(ValmError, match=r"faiss has no GPU here: pip uninstall faiss-cpu, pip install -e '\.\[gpu\]'"):
        FaissIndex.open(kb, "cuda")


def test_too_little_memory_is_named(kb, two_gpus, monkeypatch):
    build(kb, "IVF32,Flat")
    error = RuntimeError("Error in virtual void* faiss::gpu::allocMemory\ncudaMalloc error out of memory [2]")
    monkeypatch.setattr(faiss, "index_cpu_to_gpus_list", Mock(side_effect=error))
    with pytest.warns(UserWarning, match=r"on cuda:1 \(cudaMalloc error out of memory \[2\]\), so the CPU"):
        FaissIndex.open(kb, "cuda:1")


def test_a_retriever_searches_where_its_encoder_is(kb, clip, two_gpus, monkeypatch):
    build(kb, "IVF32,Flat")
    monkeypatch.setattr(type(clip), "device", property(lambda self: torch.device("cuda:1")))
    retriever = Retriever(ContextEncoder(clip), kb, K)
    assert retriever.index.device == torch.device("cuda:1") and two_gpus[-1].gpus == [1]


def test_kb_index_chooses_an_index_for_gpus(kb, clip, two_gpus, monkeypatch):
    monkeypatch.setattr("valm.retrieval.index_parameters.EXACT_BELOW", 100)
    monkeypatch.setattr("valm.cli.kb.chosen_device", lambda arguments: torch.device("cuda"))
    monkeypatch.setattr(type(kb), "load_clip", lambda self, *_, **__: clip)
    monkeypatch.setattr(type(clip), "to", lambda self, device: self)
    assert main(["kb", "index", str(kb.path), "--target-recall", "0.3"]) == 0
    assert index_parameters(kb).factory == "IVF256,SQ8"
    assert two_gpus[0].gpus == [0, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["Flat", "IVF32,Flat", "PCA8,IVF32,SQ8", "PCA8,IVF32,PQ8"])
def test_a_card_finds_the_candidates_of_the_cpu(kb, factory):
    if faiss.get_num_gpus() == 0:
        pytest.skip("this faiss has no GPUs: install valm[gpu] instead of valm[faiss]")
    build(kb, factory, device="cuda")
    asked = queries(kb, 200, seed=5)
    on_gpu, on_cpu = FaissIndex.open(kb, "cuda"), FaissIndex.open(kb)
    found, expected = on_gpu._find(asked.numpy(), 3 * K), on_cpu._find(asked.numpy(), 3 * K)
    assert (np.sort(found) == np.sort(expected)).mean() > 0.98  # but for cells and codes about equally far away
    on_gpu.search(asked, K)
