"""Trains the faiss index of a knowledge base and adds the vectors, which a later process goes on with.

    index-PLAN.partial/       PLAN: a hash of all that the index follows from
      added-COUNT.faiss       the index with its first COUNT vectors, as faiss writes it
      done.json               COUNT of the one to go on with, and its SHA-256

The folder is removed when the index is written, so a killed build loses the training, or a sixteenth of the vectors.
A file that is not what done.json says is not used. Most of the time goes into the nearest cell of each vector, which an
exact top-K search finds faster than faiss's products.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.progress import progress_bar
from valm.retrieval.index_parameters import INDEX_FILE, import_faiss, new_index, stages
from valm.store.files import WAIT_SECONDS, Count, Sha256, read_json, write_json
from valm_kernels import FlatIPIndex
from valm_kernels.atomic_files import atomic_path, folder_lock, remove_if_abandoned, remove_leftovers
from valm_kernels.checksums import file_sha256
from valm_kernels.json_files import check_own

# Training vectors per cell (faiss warns below 39), and the least and most training vectors.
TRAIN_PER_CELL = 40
MIN_TRAIN, MAX_TRAIN = 1 << 16, 1 << 20
# Vectors in memory at once, in float32.
ROWS = 1 << 15
# The index is written after each of so many parts of the vectors, but of no fewer than this.
PARTS, MIN_PART = 16, 1 << 19
# Counts up when the same plan leads to other files.
FORMAT = 2
# Numbers of a vector that FlatIPIndex takes, one of which is that of the centroid's square.
MIN_DIM, MAX_DIM = 8, 2047
DONE_FILE = "done.json"


@contextmanager
def partial_folder(kb: ImageKnowledgeBase, factory: str, seed: int) -> Iterator[Path]:
    """The folder of what is done of an index, locked; those of other indexes whose processes have ended are removed.

    Raises:
        OSError: another process makes this index, or the folder is a link or cannot be written.
    """
    sizes = (TRAIN_PER_CELL, MIN_TRAIN, MAX_TRAIN, ROWS, FORMAT, import_faiss().__version__)
    plan = hashlib.sha256(repr((kb.fingerprint, factory, seed, sizes)).encode()).hexdigest()
    folder = kb.path / f"index-{plan[:16]}.partial"
    remove_partials(kb, folder)
    while True:
        folder.mkdir(exist_ok=True)
        with ExitStack() as stack:
            try:
                before = check_own(folder).st_ino
                stack.enter_context(folder_lock(folder, WAIT_SECONDS))
                # its last owner may have removed it before this process had the lock
                if check_own(folder).st_ino != before:
                    continue
            except FileNotFoundError:  # another build took it for what a killed one has left
                continue
            remove_leftovers(folder)
            try:
                yield folder
            finally:
                with suppress(OSError):  # unless something is done
                    folder.rmdir()
            return


def remove_partials(kb: ImageKnowledgeBase, keep: Path | None = None) -> None:
    """Removes the folders of indexes whose processes have ended, but not `keep`."""
    for folder in kb.path.glob("index-*.partial"):
        if folder != keep:
            with suppress(OSError):
                remove_if_abandoned(folder)


def filled_index(
    kb: ImageKnowledgeBase, factory: str, folder: Path, packed: Path, seed: int, device: torch.device, progress: bool
) -> tuple[Path, int]:
    """The file of the faiss index of a factory string, trained and with all vectors of `kb`; and on how many it was
    trained.

    Args:
        folder: of what is done (`partial_folder`).
        packed: where an index is written whose codes are packed once all are there; any other is in `folder`.
        device: where cells are trained and the nearest ones searched: the CPU, or GPUs that faiss has.

    Raises:
        OSError: the folder cannot be written, or a file in it leads out of it.
        ValmError: a vector is not finite, or there are more cells than vectors.
    """
    faiss = import_faiss()
    index = new_index(kb.dim, factory)
    count = 0 if index.is_trained else _training_rows(kb, index)
    index, block = _unpacked(index)
    done = _read_done(folder)
    if done is not None:
        index = done
    elif count:
        rows = np.sort(np.random.default_rng(seed).choice(len(kb), count, replace=False))
        with progress_bar(total=count, desc="train", unit=" images", unit_scale=True, shown=progress) as bar:
            _train(index, _vectors(kb, rows), device)
            bar.update(count)
        _write_done(index, folder)
    _add(kb, index, folder, device, progress)
    whole = _added_file(folder, len(kb))
    if block is None:
        return whole, count
    del index, done  # before its codes are in memory a second time, packed
    mapped = faiss.read_index(str(whole), faiss.IO_FLAG_MMAP)
    whole_packed = _with_searched(mapped, faiss.IndexIVFPQFastScan(stages(mapped)[1], block))
    _write_index(whole_packed, packed, kb.path / INDEX_FILE)
    return packed, count


class NearestCell:
    """Finds the nearest of `centroids` (C, d) float32, exactly: |x - c|² is least where x·c - |c|² / 2 is largest.

    Raises:
        ValmError: d is too large.
    """

    def __init__(self, centroids: np.ndarray, device: torch.device):
        self.dim, self.device = centroids.shape[1], device
        if self.dim > MAX_DIM:
            reduced = "reduce them first, with a factory such as PCA256,IVF4096,Flat"
            raise ValmError(f"cells are found for at most {MAX_DIM} numbers, these have {self.dim}: {reduced}")
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


def _training_rows(kb: ImageKnowledgeBase, index: Any) -> int:
    """How many vectors train `index`."""
    ivf = import_faiss().try_extract_index_ivf(index)
    cells = 0 if ivf is None else ivf.nlist
    if cells > len(kb):
        raise ValmError(f"an index of {cells:,} cells needs as many images, the knowledge base has {len(kb):,}")
    return min(len(kb), MAX_TRAIN, max(MIN_TRAIN, TRAIN_PER_CELL * cells))


def _train(index: Any, sample: np.ndarray, device: torch.device) -> None:
    """Trains `index` on `sample` (n, E); faiss finds its cells on all GPUs if `device` is one."""
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
        nearest.this.own(True)  # which the assignment took from Python, and faiss does not free


def _add(kb: ImageKnowledgeBase, index: Any, folder: Path, device: torch.device, progress: bool) -> None:
    """Adds the vectors of `kb` that `index` has not, and writes it after each part of them."""
    faiss = import_faiss()
    transforms, searched = stages(index)
    nearest = None
    if not torch.cuda.is_available():  # faiss may have a GPU where torch has none
        device = torch.device("cpu")
    if isinstance(searched, faiss.IndexIVF) and not isinstance(searched, faiss.IndexIVFFastScan):
        nearest = NearestCell(searched.quantizer.reconstruct_n(0, searched.nlist), device)
    with progress_bar(
        total=len(kb), initial=index.ntotal, desc="add", unit=" images", unit_scale=True, shown=progress
    ) as bar:
        part = max(MIN_PART, -(-len(kb) // PARTS))
        for start in range(index.ntotal, len(kb), part):
            end = min(start + part, len(kb))
            for first in range(start, end, ROWS):
                rows = np.arange(first, min(first + ROWS, end))
                vectors = _vectors(kb, rows)
                if nearest is None:  # faiss alone adds to graphs, and to an index within another
                    index.add(vectors)
                else:
                    for transform in transforms:
                        vectors = transform.apply(vectors)
                    cells = nearest(vectors)
                    searched.add_core(len(rows), faiss.swig_ptr(vectors), None, faiss.swig_ptr(cells))
                    index.ntotal = searched.ntotal
                bar.update(len(rows))
            _write_done(index, folder)


def _unpacked(index: Any) -> tuple[Any, int | None]:
    """`index`, an untrained one, with codes as `add_core` adds them, if it packs codes of 4 bits by the block, and how
    many vectors a block has; None for another."""
    faiss = import_faiss()
    searched = stages(index)[1]
    if not isinstance(searched, faiss.IndexIVFPQFastScan):
        return index, None
    plain = faiss.IndexIVFPQ(searched.quantizer, searched.d, searched.nlist, searched.pq.M, searched.pq.nbits)
    plain.by_residual = searched.by_residual
    return _with_searched(index, plain), searched.bbs


def _with_searched(index: Any, other: Any) -> Any:
    """`index` with `other` in the place of the inverted file behind its transforms; `other` has its quantizer."""
    searched = stages(index)[1]
    searched.own_fields, other.own_fields = False, True
    if searched is index:
        return other
    index.index = other  # which `index` owns now
    searched.this.own(True)
    return index


def _vectors(kb: ImageKnowledgeBase, rows: np.ndarray) -> np.ndarray:
    """Some vectors of `kb`, float32."""
    vectors = kb.gather(rows).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ValmError(f"the knowledge base {kb.path} is damaged: a vector is not finite; build it again")
    return vectors


class Done(TypedDict):
    """The index that a later process goes on with: how many vectors it has, and the SHA-256 of its file."""

    added: Count
    sha256: Sha256


def _read_done(folder: Path) -> Any:
    """The index to go on with; None without one, or where it is not what was written."""
    with suppress(FileNotFoundError, ValmError):
        check_own(folder / DONE_FILE)
        done = read_json(folder / DONE_FILE, "what is done of the index", Done)
        file = _added_file(folder, done["added"])
        check_own(file)
        if file_sha256(file) == done["sha256"]:
            return import_faiss().read_index(str(file))
    return None


def _write_done(index: Any, folder: Path) -> None:
    file = _added_file(folder, index.ntotal)
    with atomic_path(file) as temporary:
        _write_index(index, temporary, file)
    write_json(folder / DONE_FILE, {"added": index.ntotal, "sha256": file_sha256(file)})
    for other in folder.glob("added-*"):
        if other != file:
            other.unlink()


def _added_file(folder: Path, count: int) -> Path:
    return folder / f"added-{count}.faiss"


def _write_index(index: Any, temporary: Path, file: Path) -> None:
    """Writes a faiss index to `temporary`, which is to become `file`."""
    faiss = import_faiss()
    try:
        # faiss's own file says nothing where its last bytes do not fit
        with temporary.open("wb") as opened:
            faiss.write_index(index, faiss.PyCallbackIOWriter(opened.write))
    except (OSError, RuntimeError) as error:  # the latter from inside faiss
        reason = "the disk is full, or does not let it be written"
        raise ValmError(f"cannot write {file}: {reason}; what was there is untouched") from error
