"""Trains the faiss index of a knowledge base and adds the vectors in parts.

    index-PLAN.partial    the index with its first vectors, as faiss writes it, and the SHA-256 of these bytes; PLAN is
                          a hash of everything on which the index depends

The next build continues with this file, so a killed build loses at most the training or a sixteenth of the vectors. If
the file is damaged, the next build starts again. faiss ignores the SHA-256 at the end.
Finding the nearest cell of each vector takes most of the time; an exact top-K search finds it faster than faiss.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.progress import progress_bar
from valm.retrieval.index_parameters import INDEX_FILE, import_faiss, new_index, stages
from valm_kernels import FlatIPIndex
from valm_kernels.atomic_files import atomic_path
from valm_kernels.checksums import SHA256_BYTES, file_sha256
from valm_kernels.json_files import check_own

# Training vectors per cell (faiss warns below 39), and the least and most training vectors.
TRAIN_PER_CELL = 40
MIN_TRAIN, MAX_TRAIN = 1 << 16, 1 << 20
# Vectors in memory at once, in float32.
ROWS = 1 << 15
# The index is written after each of PARTS parts of the vectors, of at least MIN_PART vectors.
PARTS, MIN_PART = 16, 1 << 19
# Widths of a vector that FlatIPIndex takes, less one for the centroid's square.
MIN_DIM, MAX_DIM = 8, 2047


def partial_file(kb: ImageKnowledgeBase, factory: str, seed: int) -> Path:
    """The file of a partly built index. Removes the files of other indexes."""
    sizes = (TRAIN_PER_CELL, MIN_TRAIN, MAX_TRAIN, ROWS, import_faiss().__version__)
    plan = hashlib.sha256(repr((kb.fingerprint, factory, seed, sizes)).encode()).hexdigest()
    file = kb.path / f"index-{plan[:16]}.partial"
    remove_partials(kb, file)
    return file


def remove_partials(kb: ImageKnowledgeBase, keep: Path | None = None) -> None:
    """Removes the files that killed builds left, except `keep`."""
    for file in kb.path.glob("index-*.partial"):
        if file != keep:
            file.unlink()


def filled_index(
    kb: ImageKnowledgeBase,
    factory: str,
    partial: Path,
    packed: Path,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Path:
    """The file of the faiss index of a factory string, trained and with all vectors of `kb`.

    Args:
        partial: file of the partly built index (`partial_file`), which may be missing. In the end it holds all vectors.
        packed: where the index is written if its codes are packed once all are added. Other indexes stay in `partial`.
        device: where cells are trained and nearest cells searched: the CPU, or GPUs that faiss supports.

    Raises:
        OSError: `partial` cannot be written, or is a link that leads out of its folder.
        ValmError: a vector is not finite, or there are more cells than vectors.
    """
    faiss = import_faiss()
    index, block = _unpacked(new_index(kb.dim, factory))
    device = torch.device(device)
    if _is_whole(partial):
        index = faiss.read_index(str(partial))
    elif not index.is_trained:
        count = training_rows(kb, index)
        rows = np.sort(np.random.default_rng(seed).choice(len(kb), count, replace=False))
        with progress_bar(total=count, desc="train", unit=" images", unit_scale=True, shown=progress) as bar:
            _train(index, _vectors(kb, rows), device)
            bar.update(count)
        _write(index, partial)
    _add(kb, index, partial, device, progress)
    if block is None:
        return partial
    del index  # frees its codes before they are packed in memory
    mapped = faiss.read_index(str(partial), faiss.IO_FLAG_MMAP)
    whole = _with_searched(mapped, faiss.IndexIVFPQFastScan(stages(mapped)[1], block))
    _write_to(packed, whole, kb.path / INDEX_FILE)
    return packed


class NearestCell:
    """Finds the nearest of `centroids` (C, d) float32 exactly: |x - c|² is least if x·c - |c|² / 2 is largest."""

    def __init__(self, centroids: np.ndarray, device: torch.device):
        self.dim, self.device = centroids.shape[1], device
        rows = torch.from_numpy(centroids).to(device)
        self._index = FlatIPIndex(self._with_last(rows, -0.5 * rows.square().sum(1)))

    def _with_last(self, vectors: torch.Tensor, last: torch.Tensor | float) -> torch.Tensor:
        wider = torch.zeros(len(vectors), max(MIN_DIM, self.dim + 1), device=self.device)
        wider[:, : self.dim], wider[:, -1] = vectors, last
        return wider

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Cells (n,) int64 of vectors (n, d) float32."""
        queries = self._with_last(torch.from_numpy(vectors), 1.0)
        return self._index.search(queries, 1).indices[:, 0].cpu().numpy()


def training_rows(kb: ImageKnowledgeBase, index: Any) -> int:
    """The number of vectors that train a new `index`. Raises ValmError if it has more cells than vectors."""
    if index.is_trained:  # it needs no training
        return 0
    ivf = import_faiss().try_extract_index_ivf(index)
    cells = 0 if ivf is None else ivf.nlist
    if cells > len(kb):
        raise ValmError(f"an index of {cells:,} cells needs as many images, but the knowledge base has {len(kb):,}")
    return min(len(kb), MAX_TRAIN, max(MIN_TRAIN, TRAIN_PER_CELL * cells))


def _train(index: Any, sample: np.ndarray, device: torch.device) -> None:
    """Trains `index` on `sample` (n, E). If `device` is a GPU, faiss finds the cells on all GPUs."""
    faiss = import_faiss()
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None or device.type == "cpu":
        index.train(sample)
        return
    nearest = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(ivf.d))
    ivf.clustering_index = nearest
    try:
        index.train(sample)
    finally:
        ivf.clustering_index = None
        nearest.this.own(True)  # Python frees it again: the assignment gave it to faiss, which does not


def _add(kb: ImageKnowledgeBase, index: Any, partial: Path, device: torch.device, progress: bool) -> None:
    """Adds the vectors of `kb` that `index` lacks, and writes `index` after each part."""
    faiss = import_faiss()
    transforms, searched = stages(index)
    nearest = None
    if not torch.cuda.is_available():  # faiss may support GPUs although torch does not
        device = torch.device("cpu")
    if (
        isinstance(searched, faiss.IndexIVF)
        and not isinstance(searched, faiss.IndexIVFFastScan)
        and searched.d <= MAX_DIM
    ):
        nearest = NearestCell(searched.quantizer.reconstruct_n(0, searched.nlist), device)
    part = max(MIN_PART, -(-len(kb) // PARTS))
    done = index.ntotal
    with progress_bar(total=len(kb), initial=done, desc="add", unit=" images", unit_scale=True, shown=progress) as bar:
        for start in range(done, len(kb), part):
            end = min(start + part, len(kb))
            for first in range(start, end, ROWS):
                vectors = _vectors(kb, np.arange(first, min(first + ROWS, end)))
                if nearest is None:  # only faiss can add to graphs, and to an index within another
                    index.add(vectors)
                else:
                    for transform in transforms:
                        vectors = transform.apply(vectors)
                    cells = nearest(vectors)
                    searched.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(cells))
                    index.ntotal = searched.ntotal
                bar.update(len(vectors))
            _write(index, partial)


def _unpacked(index: Any) -> tuple[Any, int | None]:
    """An untrained `index`, and None; or, if it packs 4-bit codes in blocks, the same index with codes that `add_core`
    adds, and the vectors of a block."""
    faiss = import_faiss()
    searched = stages(index)[1]
    if not isinstance(searched, faiss.IndexIVFPQFastScan):
        return index, None
    plain = faiss.IndexIVFPQ(searched.quantizer, searched.d, searched.nlist, searched.pq.M, searched.pq.nbits)
    plain.by_residual = searched.by_residual
    return _with_searched(index, plain), searched.bbs


def _with_searched(index: Any, other: Any) -> Any:
    """`index` in which `other` replaces the inverted file after the transforms; `other` takes over its quantizer."""
    searched = stages(index)[1]
    searched.own_fields, other.own_fields = False, True
    if searched is index:
        return other
    index.index = other  # `index` owns it now
    searched.this.own(True)
    return index


def _vectors(kb: ImageKnowledgeBase, rows: np.ndarray) -> np.ndarray:
    """Some vectors of `kb`, float32."""
    vectors = kb.gather(rows).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ValmError(f"the knowledge base {kb.path} is damaged: a vector is not finite; build it again")
    return vectors


def _is_whole(partial: Path) -> bool:
    """Whether the file exists and its SHA-256 fits. Warns if it does not fit."""
    try:
        check_own(partial)
    except FileNotFoundError:
        return False
    with open(partial, "rb") as file:
        file.seek(max(0, partial.stat().st_size - SHA256_BYTES))
        noted = file.read().hex()
    if noted == file_sha256(partial, omit=SHA256_BYTES):
        return True
    warnings.warn(f"{partial} of an interrupted build is damaged, so the index is made from the start", stacklevel=3)
    return False


def _write(index: Any, partial: Path) -> None:
    with atomic_path(partial) as temporary:
        _write_to(temporary, index, partial, with_sha256=True)


def _write_to(temporary: Path, index: Any, file: Path, *, with_sha256: bool = False) -> None:
    """Writes a faiss index, and its SHA-256 if wanted, to `temporary`, which will become `file`."""
    faiss = import_faiss()
    try:
        # faiss's own writer does not report that the last bytes do not fit on the disk
        with temporary.open("wb") as opened:
            faiss.write_index(index, faiss.PyCallbackIOWriter(opened.write))
            if with_sha256:
                opened.flush()
                opened.write(bytes.fromhex(file_sha256(temporary)))
    except (OSError, RuntimeError) as error:  # faiss raises RuntimeError
        reason = "the disk is full, or cannot be written"
        raise ValmError(f"cannot write {file}: {reason}. The old file is untouched") from error
