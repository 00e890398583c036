"""What searches a knowledge base: exactly, or through an index of faiss where it has one.

faiss finds candidates, and their float16 vectors in the knowledge base decide: scores and order are exact for
whatever was found. `valm.retrieval.index_build` makes the index and measures its recall.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from valm.errors import ValmError
from valm.files import read_json
from valm.retrieval.knowledge_base import ImageKnowledgeBase
from valm.retrieval.sharded_build import file_entry
from valm_kernels import FlatIPIndex, TopK

INDEX_FILE = "index.faiss"
PARAMETERS_FILE = "index.json"

# Pictures from which on an index is worth its making: `choose_factory` of valm.retrieval.index_build.
EXACT_BELOW = 50_000
# Queries re-ranked at once, so that their candidates' vectors stay in the cache.
RERANK_QUERIES = 64


@dataclass(frozen=True)
class IndexParameters:
    """How a knowledge base is indexed, and how well that works: what index.json says.

    factory: faiss's description of the index. trained_on: vectors of the sample it was trained on. search: faiss's
    search parameters, such as "nprobe=32" (cells of an inverted file that are looked into) or "efSearch=64" (of an HNSW
    graph). candidates: how many, for each of the K asked for, are compared exactly. recall: share of the true `k`
    nearest that were found, on `queries` queries that were not tuned on; target: what had to be reached; asked: what
    the queries are. knowledge_base: fingerprint of what is indexed. file: name, size and SHA-256 of the index.
    """

    knowledge_base: str
    factory: str
    trained_on: int
    search: str
    candidates: int
    k: int
    recall: float
    target: float
    queries: int
    asked: str
    file: dict[str, Any]

    def summary(self) -> str:
        """One line for people."""
        settings = ", ".join(filter(None, [self.factory, self.search, f"{self.candidates} candidates a picture"]))
        size = f"{self.file['bytes'] / 1e6:,.0f} MB"
        return f"{settings}, {size}; recall@{self.k} {self.recall:.3f} on {self.queries:,} {self.asked}"


def index_parameters(kb: ImageKnowledgeBase) -> IndexParameters | None:
    """What is written of the index of `kb`, None where it has none. Raises ValmError where that is damaged or stale."""
    path = kb.path / PARAMETERS_FILE
    if not path.exists():
        return None
    values = read_json(path, "the index parameters")
    try:
        parameters = IndexParameters(**values)
    except TypeError as error:
        raise ValmError(f"{path} is damaged: {error}; {_remedy(kb)}") from error
    if parameters.knowledge_base != kb.fingerprint:
        raise ValmError(f"the index in {kb.path} is of another state of the knowledge base; {_remedy(kb)}")
    return parameters


def open_index(kb: ImageKnowledgeBase, device: torch.device | str = "cpu") -> FlatIPIndex | FaissIndex:
    """What searches `kb`: its faiss index where it has one, else exact search on `device`.

    This is the one place that decides it. Warns where exact search is given EXACT_BELOW pictures or more. Raises
    ValmError for an index that is damaged or stale, ImportError for one that cannot be read without faiss.
    """
    if index_parameters(kb) is not None:
        return FaissIndex.open(kb)
    if len(kb) >= EXACT_BELOW:
        size = f"{2e-9 * len(kb) * kb.dim:,.1f} GB"
        warnings.warn(
            f"the knowledge base {kb.path} has no index: all its {len(kb):,} vectors ({size}) are in memory and "
            f"compared with each query; `valm kb index {kb.path}` makes an index that needs neither",
            stacklevel=2,
        )
    return FlatIPIndex(kb.vectors(), device=device)


def verify_index(kb: ImageKnowledgeBase) -> list[str]:
    """The name of the index file of `kb` in a list, where its content is not what was written."""
    parameters = index_parameters(kb)
    if parameters is None or file_entry(kb.path / INDEX_FILE) == parameters.file:
        return []
    return [INDEX_FILE]


def remove_index(kb: ImageKnowledgeBase) -> None:
    """Takes the index of `kb` away, where it has one: it is searched exactly from now on."""
    for name in (PARAMETERS_FILE, INDEX_FILE):
        (kb.path / name).unlink(missing_ok=True)


class FaissIndex:
    """Search through faiss, decided by the exact vectors; made by `build_index`, opened by `FaissIndex.open`."""

    def __init__(self, kb: ImageKnowledgeBase, index: Any, parameters: IndexParameters):
        self.kb = kb
        self.parameters = parameters
        self._index = index
        import_faiss().ParameterSpace().set_index_parameters(index, parameters.search)

    @classmethod
    def open(cls, kb: ImageKnowledgeBase) -> FaissIndex:
        """The index in the folder of `kb`, memory-mapped. Raises ValmError where there is none, or another's, or a
        damaged one; ImportError without faiss."""
        parameters = index_parameters(kb)
        if parameters is None:
            raise ValmError(f"the knowledge base {kb.path} has no index: it has no {PARAMETERS_FILE}")
        path = kb.path / INDEX_FILE
        found = path.stat().st_size if path.exists() else None
        if found != parameters.file["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes instead of {parameters.file['bytes']}"
            raise ValmError(f"{path} is damaged: it {state}; {_remedy(kb)}")
        try:
            return cls(kb, read_index(path), parameters)
        except RuntimeError as error:
            raise ValmError(f"cannot read {path}; {_remedy(kb)}") from error

    def __reduce__(self):
        return FaissIndex.open, (self.kb,)

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


def read_index(path: Path) -> Any:
    """The faiss index in a file, its inverted lists or vectors memory-mapped where faiss can do that."""
    faiss = import_faiss()
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)


def import_faiss():
    """faiss, or an ImportError that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("an approximate index needs faiss: install valm[faiss], or valm[gpu]") from error
    return faiss


def _remedy(kb: ImageKnowledgeBase) -> str:
    return f"make it anew with `valm kb index {kb.path}`, or delete {PARAMETERS_FILE} to search exactly"


def _rerank(kb: ImageKnowledgeBase, queries: Tensor, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of the candidates `found` (Q, C), -1 = none, by (score falling, id rising).

    Scores are sums in float64, rounded to float32; summed are only those that can be among the best by a sum in
    float32. With any order of its terms that is off by at most E u |q| |v|, u = 2^-24 (Higham 2002, section 3.1).
    """
    scores = torch.full((len(queries), k), -torch.inf)
    ids = torch.full((len(queries), k), -1)
    width = min(k, found.shape[1])
    # so that equal scores come in order of their ids
    found = found.sort(-1).values
    for start in range(0, len(queries), RERANK_QUERIES):
        part = slice(start, start + RERANK_QUERIES)
        asked, candidates = queries[part], found[part]
        unique, place = torch.unique(candidates.clamp(min=0), return_inverse=True)
        pool = torch.from_numpy(kb.gather(unique.numpy())).float()  # (U, E): the queries of a text share many
        rough = (asked @ pool.T).gather(1, place).masked_fill(candidates < 0, -torch.inf)  # (q, C)
        # of both sums that are compared, and the rounding of both scores
        bound = 2 * (kb.dim + 2) * 2**-24 * asked.norm(dim=1) * pool.norm(dim=1).max()  # (q,)
        ranked = rough.topk(width).values  # (q, width)
        finalists = int((rough >= ranked[:, -1:] - bound[:, None]).sum(1).max())
        nearest = rough.topk(finalists).indices.sort(-1).values
        candidates, place = candidates.gather(1, nearest), place.gather(1, nearest)
        exact = torch.einsum("qe,qce->qc", asked.double(), pool[place].double()).float()
        exact = exact.masked_fill(candidates < 0, -torch.inf)
        best = exact.sort(dim=-1, descending=True, stable=True)
        scores[part, :width] = best.values[:, :width]
        ids[part, :width] = candidates.gather(1, best.indices[:, :width])
    return scores, ids
