"""An approximate index for knowledge bases too large to be searched exactly, with a measured recall.

faiss finds candidates, and their float16 vectors in the knowledge base decide: scores and order are exact for
whatever was found. How many cells faiss looks into is tuned when the index is built, on queries like those it will
be asked, until enough of the true K nearest are found; the recall on other queries of the same kind is kept with it.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from valm.errors import ValmError
from valm.files import atomic_path, read_json, write_json
from valm.retrieval.knowledge_base import ImageKnowledgeBase
from valm_kernels import FlatIPIndex, TopK

INDEX_FILE = "index.faiss"
PARAMETERS_FILE = "index.json"

# Vectors a cell should have to be trained on (faiss warns below 39), and at most how many are taken for it.
TRAIN_PER_CELL = 64
MAX_TRAIN = 1 << 20
# From here on vectors are kept as 64-byte product codes, as published, instead of a byte per number.
PRODUCT_CODES_FROM = 10_000_000
ADD_ROWS = 1 << 16
# Exact scores computed at once: each query has its own candidates' vectors.
RERANK_QUERIES = 128


@dataclass(frozen=True)
class IndexParameters:
    """How a knowledge base is indexed, and how well that works.

    factory: faiss's description. nprobe: cells looked into. candidates: how many, for each of the K asked for, are
    compared exactly. recall: share of the true `k` nearest that were found, on `queries` held-out queries.
    knowledge_base: fingerprint of what is indexed.
    """

    knowledge_base: str
    factory: str
    nprobe: int
    candidates: int
    k: int
    recall: float
    queries: int


class FaissIndex:
    """Search through faiss, decided by the exact vectors; made by `build_index`, opened by `FaissIndex.open`."""

    def __init__(self, kb: ImageKnowledgeBase, index: Any, parameters: IndexParameters):
        self.kb = kb
        self.parameters = parameters
        self._index = index

    @classmethod
    def open(cls, kb: ImageKnowledgeBase) -> FaissIndex:
        """The index in the folder of `kb`, memory-mapped. Raises ValmError where there is none or it is another's."""
        if not (kb.path / PARAMETERS_FILE).exists():
            raise ValmError(f"the knowledge base {kb.path} has no index: it has no {PARAMETERS_FILE}")
        values = read_json(kb.path / PARAMETERS_FILE, "the index parameters")
        try:
            parameters = IndexParameters(**values)
        except TypeError as error:
            raise ValmError(f"{kb.path / PARAMETERS_FILE} is damaged: {error}; build the index again") from error
        if parameters.knowledge_base != kb.fingerprint:
            raise ValmError(f"the index in {kb.path} is of another knowledge base; build the index again")
        faiss = _faiss()
        try:
            index = faiss.read_index(str(kb.path / INDEX_FILE), faiss.IO_FLAG_MMAP)
        except RuntimeError as error:
            raise ValmError(f"cannot read {kb.path / INDEX_FILE}; build the index again") from error
        _set_nprobe(index, parameters.nprobe)
        return cls(kb, index, parameters)

    def __len__(self) -> int:
        return self._index.ntotal

    def search(self, queries: Tensor, k: int) -> TopK:
        """The `k` best that were found for each query (..., E), by (score falling, id rising).

        Scores are exact, float32. Where fewer than `k` were found, ids are -1 and scores -inf.
        """
        flat = queries.reshape(-1, queries.shape[-1]).float().cpu()
        if len(flat):
            _, found = self._index.search(flat.numpy(), min(len(self), k * self.parameters.candidates))
        else:
            found = np.empty((0, k), np.int64)
        scores, ids = _rerank(self.kb, flat, torch.from_numpy(found), k)
        shape = (*queries.shape[:-1], k)
        return TopK(scores.reshape(shape).to(queries.device), ids.reshape(shape).to(queries.device))


def build_index(
    kb: ImageKnowledgeBase,
    queries: Tensor,
    *,
    k: int = 4,
    target_recall: float = 0.95,
    factory: str | None = None,
    candidates: int = 8,
    seed: int = 0,
) -> FaissIndex:
    """Indexes `kb` and writes the index beside it.

    queries: (Q, E) of the kind the index will be asked (context queries of real text). Half of them tune nprobe, on the
        other half recall is measured; the true nearest come from an exact search.
    target_recall: share of the true `k` nearest to find.
    factory: a faiss factory string of an inverted file ("IVF4096,Flat", "OPQ64,IVF65536,PQ64"); None chooses.
    Raises ValmError where the target is not reached with all cells looked into, ImportError without faiss.
    """
    faiss = _faiss()
    queries = queries.reshape(-1, kb.dim).float().cpu()
    if len(queries) < 2:
        raise ValmError(f"an index needs queries to be tuned and measured on, got {len(queries)}")
    factory = factory or choose_factory(len(kb), kb.dim)
    index = faiss.index_factory(kb.dim, factory, faiss.METRIC_INNER_PRODUCT)
    cells = faiss.extract_index_ivf(index).nlist
    count = min(len(kb), MAX_TRAIN, TRAIN_PER_CELL * cells)
    sample = np.sort(np.random.default_rng(seed).choice(len(kb), count, replace=False))
    index.train(kb.gather(sample).astype(np.float32))
    for start in range(0, len(kb), ADD_ROWS):
        rows = np.arange(start, min(start + ADD_ROWS, len(kb)))
        index.add(kb.gather(rows).astype(np.float32))

    truth = FlatIPIndex(kb.vectors()).search(queries, k).indices
    tuning, measuring = slice(0, None, 2), slice(1, None, 2)
    nprobe = 1
    while True:
        _set_nprobe(index, nprobe)
        parameters = IndexParameters(kb.fingerprint, factory, nprobe, candidates, k, 0.0, 0)
        found = FaissIndex(kb, index, parameters)
        reached = recall(found.search(queries[tuning], k).indices, truth[tuning])
        if reached >= target_recall:
            break
        if nprobe == cells:
            raise ValmError(
                f"{factory} finds {reached:.3f} of the {k} nearest with all its cells, less than the {target_recall} "
                f"asked for; use finer codes (a factory with SQ8 or Flat) or more candidates"
            )
        nprobe = min(2 * nprobe, cells)
    measured = recall(found.search(queries[measuring], k).indices, truth[measuring])
    parameters = IndexParameters(kb.fingerprint, factory, nprobe, candidates, k, measured, len(truth[measuring]))
    # the parameters go last: without them there is no index
    (kb.path / PARAMETERS_FILE).unlink(missing_ok=True)
    with atomic_path(kb.path / INDEX_FILE) as temporary:
        faiss.write_index(index, os.fspath(temporary))
    write_json(kb.path / PARAMETERS_FILE, asdict(parameters))
    return FaissIndex.open(kb)


def choose_factory(count: int, dim: int) -> str:
    """An inverted file of about 4 sqrt(N) cells, with a byte per number or, for very many, 64 bytes per vector."""
    cells = 1 << max(0, round(np.log2(4 * np.sqrt(count))))
    cells = max(1, min(cells, count // 39))
    if count < PRODUCT_CODES_FROM or dim % 64:
        return f"IVF{cells},SQ8"
    return f"OPQ64,IVF{cells},PQ64"


def recall(found: Tensor, truth: Tensor) -> float:
    """Share of the ids in `truth` (Q, K) that are in the same row of `found` (Q, K)."""
    return (truth[:, :, None] == found[:, None, :]).any(-1).float().mean().item()


def _rerank(kb: ImageKnowledgeBase, queries: Tensor, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of the candidates `found` (Q, C), -1 = none, by their exact scores."""
    scores = torch.full((len(queries), k), -torch.inf)
    ids = torch.full((len(queries), k), -1)
    for start in range(0, len(queries), RERANK_QUERIES):
        part = slice(start, start + RERANK_QUERIES)
        candidates = found[part].sort(-1).values  # so that equal scores come in order of their ids
        unique, place = torch.unique(candidates.clamp(min=0), return_inverse=True)
        vectors = torch.from_numpy(kb.gather(unique.numpy())).double()
        exact = torch.einsum("qe,qce->qc", queries[part].double(), vectors[place]).float()
        exact = exact.masked_fill(candidates < 0, -torch.inf)
        best = exact.sort(dim=-1, descending=True, stable=True)
        width = min(k, candidates.shape[1])
        scores[part, :width] = best.values[:, :width]
        ids[part, :width] = candidates.gather(1, best.indices[:, :width])
    return scores, ids


def _set_nprobe(index: Any, nprobe: int) -> None:
    _faiss().extract_index_ivf(index).nprobe = nprobe


def _faiss():
    try:
        import faiss
    except ImportError as error:
        raise ImportError("an approximate index needs faiss: install valm[faiss], or valm[gpu]") from error
    return faiss
