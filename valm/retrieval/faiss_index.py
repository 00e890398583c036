"""Searches a knowledge base, exactly or through its faiss index.

faiss finds candidates, which are reranked by their float16 vectors in the knowledge base, so scores and order are
exact. `valm.retrieval.index_tuning` makes the index and measures its recall.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.faiss_gpu import faiss_device, on_gpus
from valm.retrieval.index_parameters import (
    EXACT_BELOW,
    INDEX_FILE,
    PARAMETERS_FILE,
    IndexParameters,
    file_entry,
    import_faiss,
    index_parameters,
    remedy,
    stages,
)
from valm.text import one_line
from valm_kernels import FlatIPIndex, TopK
from valm_kernels.json_files import check_own
from valm_kernels.locks import Lock

# Distances between queries and centroids held in memory at once.
CELL_DISTANCES = 1 << 24


def open_index(kb: ImageKnowledgeBase, device: torch.device | str = "cpu") -> FlatIPIndex | FaissIndex:
    """The index that searches `kb` on `device`: its faiss index if there is one, otherwise exact search.

    Warns if exact search compares EXACT_BELOW images or more. faiss-cpu searches on the CPU.

    Raises:
        ValmError: the faiss index is damaged or stale.
        ImportError: there is a faiss index, but faiss is not installed.
    """
    if index_parameters(kb) is not None:
        return FaissIndex.open(kb, faiss_device(device))
    if len(kb) >= EXACT_BELOW:
        size = f"{2e-9 * len(kb) * kb.dim:,.1f} GB"
        warnings.warn(
            f"the knowledge base {kb.path} has no index, so all its {len(kb):,} vectors ({size}) are held in memory "
            f"and compared with each query. `valm kb index {kb.path}` makes an index that needs neither",
            stacklevel=2,
        )
    try:
        return FlatIPIndex(kb.vectors(), device=device)
    except ValueError as error:  # a vector that is not finite
        raise ValmError(f"the knowledge base {kb.path} is damaged: {error}; build it again") from error


def verify_index(kb: ImageKnowledgeBase) -> list[str]:
    """A list with the name of the index file of `kb` if the file has changed or is missing, otherwise an empty list.

    An index file without parameters, which a killed `build_index` leaves, is not used and does not count as damaged.
    """
    parameters, file = index_parameters(kb), kb.path / INDEX_FILE
    if not os.path.lexists(file):
        return [] if parameters is None else [INDEX_FILE]
    check_own(file)
    return [] if parameters is None or file_entry(file) == parameters.file else [INDEX_FILE]


def remove_index(kb: ImageKnowledgeBase) -> None:
    """Removes the index of `kb`, if any. From then on `kb` is searched exactly."""
    for name in (PARAMETERS_FILE, INDEX_FILE):
        (kb.path / name).unlink(missing_ok=True)


class FaissIndex:
    """Search through faiss, reranked by the exact vectors. `build_index` makes it, `FaissIndex.open` opens it.

    Threads may share an index and search at once. On GPUs, faiss finds candidates for one search after the other.

    Args:
        index: a faiss index on the CPU.
        device: where faiss finds the candidates: "cpu", one GPU ("cuda:0"), or all GPUs that faiss sees ("cuda"), each
            with a part of the index. If faiss cannot search the index there, it is searched on the CPU, with a warning.
            Candidates are reranked on the CPU, where the knowledge base is.

    Raises:
        ValmError: faiss has no GPU.
    """

    def __init__(
        self, kb: ImageKnowledgeBase, index: Any, parameters: IndexParameters, device: torch.device | str = "cpu"
    ):
        faiss = import_faiss()
        self.kb = kb
        self.device = torch.device(device)
        self._transforms, self._cells = [], None
        self._gpu = Lock()  # faiss's GPU indexes do not support searches at once
        if self.device.type == "cuda":
            try:
                index = on_gpus(index, self.device, parameters.search, parameters.k * parameters.candidates)
            except RuntimeError as error:
                reason = one_line(str(error).strip().rpartition("\n")[2])
                warnings.warn(
                    f"faiss cannot search the index of {kb.path} on {self.device} ({reason}), so the CPU searches it. "
                    f"`valm kb index {kb.path} --device cuda` makes an index for GPUs",
                    stacklevel=2,
                )
                self.device = torch.device("cpu")
        if self.device.type == "cuda":
            self._settings = faiss.GpuParameterSpace()
        else:
            self._settings = faiss.ParameterSpace()
            transforms, searched = stages(index)
            if isinstance(searched, faiss.IndexIVFPQFastScan):
                quantizer = faiss.downcast_index(searched.quantizer)
                if isinstance(quantizer, faiss.IndexFlat) and quantizer.metric_type == faiss.METRIC_L2:
                    self._transforms, self._cells = transforms, _Cells(searched, quantizer)
        self._index = index
        self.use(parameters)

    def use(self, parameters: IndexParameters) -> None:
        """Searches by these parameters from now on, for tuning. No other thread may search meanwhile."""
        self._settings.set_index_parameters(self._index, parameters.search)
        self.parameters = parameters

    @classmethod
    def open(cls, kb: ImageKnowledgeBase, device: torch.device | str = "cpu") -> FaissIndex:
        """The index in the folder of `kb`, memory-mapped, or copied to GPUs (`device` as for the class).

        Raises:
            ValmError: the index is missing, damaged or of another knowledge base, or faiss has no GPU.
            ImportError: faiss is not installed.
        """
        parameters = index_parameters(kb)
        if parameters is None:
            raise ValmError(f"the knowledge base {kb.path} has no index: {PARAMETERS_FILE} is missing")
        path = kb.path / INDEX_FILE
        try:
            found = check_own(path).st_size
        except FileNotFoundError:
            raise ValmError(f"{path} is damaged: it is missing; {remedy(kb)}") from None
        if found != parameters.file["bytes"]:
            raise ValmError(
                f"{path} is damaged: it has {found} bytes instead of {parameters.file['bytes']}; {remedy(kb)}"
            )
        try:
            index = read_index(path)
            if (index.d, index.ntotal) != (kb.dim, len(kb)):
                raise ValmError(
                    f"{path} contains {index.ntotal:,} vectors of {index.d} numbers, but the knowledge base contains "
                    f"{len(kb):,} of {kb.dim}; {remedy(kb)}"
                )
            return cls(kb, index, parameters, device)
        except RuntimeError as error:
            raise ValmError(f"cannot read {path}; {remedy(kb)}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return FaissIndex.open, (self.kb, self.device)

    def __len__(self) -> int:
        return self._index.ntotal

    def search(self, queries: Tensor, k: int) -> TopK:
        """The `k` best candidates for each query (..., E), by (score falling, id rising).

        Scores are exact, float32. Results are padded with id -1 and score -inf. A query with NaN or infinity gets ids
        -1 and scores NaN.
        """
        flat = queries.reshape(-1, queries.shape[-1]).float().cpu()
        broken = ~flat.isfinite().all(1)
        flat = flat.masked_fill(broken[:, None], 0)
        found = self._find(flat.numpy(), min(len(self), k * self.parameters.candidates))
        if found.size and found.max() >= len(self.kb):
            raise ValmError(f"{self.kb.path / INDEX_FILE} is damaged: it finds image {found.max()}; {remedy(self.kb)}")
        scores, ids = _rerank(self.kb, flat, torch.from_numpy(found), k)
        if scores.isnan().any():
            raise ValmError(f"the knowledge base {self.kb.path} is damaged: a vector is not finite; build it again")
        scores[broken], ids[broken] = torch.nan, -1
        shape = (*queries.shape[:-1], k)
        return TopK(scores.reshape(shape).to(queries.device), ids.reshape(shape).to(queries.device))

    def _find(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Ids (Q, count) int64 of the candidates for queries (Q, E), -1 = none."""
        if not len(queries):
            return np.empty((0, count), np.int64)
        if self.device.type == "cuda":
            with self._gpu:
                return self._index.search(queries, count)[1]
        if self._cells is None:
            return self._index.search(queries, count)[1]
        for transform in self._transforms:
            queries = transform.apply(queries)
        return self._cells.search(queries, count)


class _Cells:
    """IVF of 4-bit codes whose cells PyTorch selects, because faiss's CPU matmul would dominate these fast scans.

    Other codes take longer to scan, and only faiss's own search distributes them over threads.
    """

    def __init__(self, ivf: Any, quantizer: Any):
        if quantizer.ntotal != ivf.nlist:
            raise RuntimeError(f"an inverted file of {ivf.nlist} cells has {quantizer.ntotal} centroids")
        self._ivf = ivf
        # a view of faiss's memory, which lives as long as the index
        centroids = import_faiss().rev_swig_ptr(quantizer.get_xb(), ivf.nlist * ivf.d)
        self._centroids = torch.from_numpy(centroids).reshape(ivf.nlist, ivf.d)
        self._squares = self._centroids.square().sum(1)

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Ids (Q, count) int64 of the candidates for transformed queries (Q, d)."""
        self._ivf.nprobe = min(self._ivf.nprobe, self._ivf.nlist)
        found = [
            self._ivf.search_preassigned(part.numpy(), count, *self._nearest(part))[1]
            for part in torch.from_numpy(queries).split(max(1, CELL_DISTANCES // self._ivf.nlist))
        ]
        return np.concatenate(found)

    def _nearest(self, queries: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The nprobe nearest cells (Q, nprobe) of each query, and the squared distances of their centroids."""
        with torch.autocast("cpu", enabled=False):  # the caller may be in autocast
            distances = torch.addmm(self._squares, queries, self._centroids.T, alpha=-2)  # without |q|²
        nearest = distances.topk(self._ivf.nprobe, largest=False)
        return nearest.indices.numpy(), (nearest.values + queries.square().sum(1, keepdim=True)).numpy()


def read_index(path: Path) -> Any:
    """The faiss index in a file, with its inverted lists or vectors memory-mapped if faiss supports that."""
    faiss = import_faiss()
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)


def _rerank(kb: ImageKnowledgeBase, queries: Tensor, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of the candidates `found` (Q, C), -1 = none, by (exact score falling, id rising): scores and ids."""
    found = found.sort(-1).values  # equal scores will be in order of id
    scores = torch.full(found.shape, -torch.inf)
    query_ids, places = (found >= 0).nonzero(as_tuple=True)
    pairs = query_ids.numpy(), found[query_ids, places].numpy()
    scores[query_ids, places] = torch.from_numpy(kb.scores(queries, *pairs))
    missing = (0, max(0, k - found.shape[1]))
    scores, found = F.pad(scores, missing, value=-torch.inf), F.pad(found, missing, value=-1)
    best = scores.sort(dim=-1, descending=True, stable=True)
    return best.values[:, :k], found.gather(1, best.indices[:, :k])
