"""Trains the faiss index of a knowledge base and fills it with the vectors, in steps that a later process goes on with.

    index-PLAN.partial/             PLAN: a hash of all that the index follows from
      transforms.faiss              the index, with its transforms trained
      cells-00.npy, ...             the centroids (C, d) float32 after each round of k-means
      trained.faiss                 the index, without vectors
      part-TRAINED-00000.npy, ...   cell and code of each of PART_ROWS vectors; TRAINED: a hash of trained.faiss

`build_index` removes the folder when it has written the index, so a killed one loses a round or a part, or the training
of the transforms or of the codes, which faiss does at once. Most of the time goes into the nearest cell of each vector,
for which an exact top-K search is faster than faiss's products. Only faiss itself adds to graphs and to an index within
another one: their vectors are added anew.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.progress import progress_bar
from valm.retrieval.index_factory import import_faiss, stages
from valm.store.files import WAIT_SECONDS
from valm.store.folders import remove_folder
from valm.store.shards import file_entry
from valm_kernels import FlatIPIndex
from valm_kernels.atomic_files import atomic_path, folder_lock, remove_if_abandoned, remove_leftovers
from valm_kernels.json_files import check_own

# Training vectors per cell (faiss warns below 39), and the least and most training vectors.
TRAIN_PER_CELL = 40
MIN_TRAIN, MAX_TRAIN = 1 << 16, 1 << 20
ITERATIONS = 10  # iterations of k-means
# Vectors in memory at once, in float32, and those of a part.
ROWS = 1 << 15
PART_ROWS = 1 << 19
# Counts up when the same plan leads to other files.
FORMAT = 1
# Numbers of a vector that FlatIPIndex takes, one of which is that of the centroid's square.
MIN_DIM, MAX_DIM = 8, 2047


@contextmanager
def partial_folder(kb: ImageKnowledgeBase, factory: str, seed: int) -> Iterator[Path]:
    """The folder of what is done of an index, locked; those of other indexes whose processes have ended are removed.

    Raises:
        OSError: another process makes this index, or the folder is a link or cannot be written.
    """
    sizes = (TRAIN_PER_CELL, MIN_TRAIN, MAX_TRAIN, ITERATIONS, ROWS, PART_ROWS, FORMAT, import_faiss().__version__)
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
            yield folder
            return


def remove_partials(kb: ImageKnowledgeBase, keep: Path | None = None) -> None:
    """Removes the folders of indexes whose processes have ended, but not `keep`."""
    for folder in kb.path.glob("index-*.partial"):
        if folder != keep:
            with suppress(OSError):
                remove_if_abandoned(folder)


def remove_partial(folder: Path) -> None:
    """Removes the folder of an index that is written; if that is killed, nothing of it is taken for whole."""
    with suppress(OSError):  # the index is there
        remove_folder(folder)


def filled_index(
    kb: ImageKnowledgeBase, index: Any, folder: Path, seed: int, device: torch.device, progress: bool
) -> tuple[Any, int]:
    """`index`, an untrained one, trained and with all vectors of `kb`; and on how many it was trained.

    Args:
        folder: of what is done (`partial_folder`).
        device: where the nearest cells are searched.

    Raises:
        ValmError: a vector is not finite, there are more cells than vectors, or a file in the folder is damaged or
            cannot be written.
    """
    faiss = import_faiss()
    if not torch.cuda.is_available():  # faiss may have a GPU where torch has none
        device = torch.device("cpu")
    count = 0 if index.is_trained else _training_rows(kb, index)
    trained = folder / "trained.faiss"
    if os.path.lexists(trained):
        index = _read_index(trained)
    elif count:
        index = _train(kb, index, count, folder, seed, device, progress)
        _write_index(index, trained)
    ivf = stages(index)[1]
    if not (_has_plain_lists(ivf) or isinstance(ivf, faiss.IndexIVFPQFastScan)):
        with progress_bar(total=len(kb), desc="add", unit=" images", unit_scale=True, shown=progress) as bar:
            for rows in _blocks(0, len(kb)):
                index.add(kb.gather(rows).astype(np.float32))
                bar.update(len(rows))
    else:
        parts = folder / f"part-{file_entry(trained)['sha256'][:16]}"  # of no other cells
        _fill(kb, index, ivf, parts, device, progress)
    return index, count


def _has_plain_lists(index: Any) -> bool:
    """Whether it is an inverted file of ids and codes, and of nothing else."""
    faiss = import_faiss()
    return (
        isinstance(index, faiss.IndexIVF)
        and not isinstance(index, faiss.IndexIVFPQR)  # which has codes beside its lists
        and isinstance(faiss.downcast_InvertedLists(index.invlists), faiss.ArrayInvertedLists)
    )


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
        """Cells (n,) int64 of vectors (n, d) float32; -1 of one that is not finite."""
        queries = self._with_last(torch.from_numpy(vectors), 1.0)
        return self._index.search(queries, 1).indices[:, 0].cpu().numpy()


def _training_rows(kb: ImageKnowledgeBase, index: Any) -> int:
    """How many vectors train `index`."""
    ivf = import_faiss().try_extract_index_ivf(index)
    cells = 0 if ivf is None else ivf.nlist
    if cells > len(kb):
        raise ValmError(f"an index of {cells:,} cells needs as many images, the knowledge base has {len(kb):,}")
    return min(len(kb), MAX_TRAIN, max(MIN_TRAIN, TRAIN_PER_CELL * cells))


def _train(
    kb: ImageKnowledgeBase, index: Any, count: int, folder: Path, seed: int, device: torch.device, progress: bool
) -> Any:
    """`index`, trained on `count` random vectors: an inverted file's cells here, the rest by faiss."""
    faiss = import_faiss()
    rows = np.sort(np.random.default_rng(seed).choice(len(kb), count, replace=False))
    sample = kb.gather(rows).astype(np.float32)
    if not np.isfinite(sample).all():
        raise _not_finite(kb)
    transformed = folder / "transforms.faiss"
    if transformed.exists():
        index = _with_transforms(index, _read_index(transformed))
    transforms, searched = stages(index)
    for transform in transforms:
        if not transformed.exists():
            transform.train(sample)
        sample = transform.apply(sample)
    if transforms and not transformed.exists():
        _write_index(index, transformed)
    if isinstance(searched, faiss.IndexIVF):
        centroids = _train_cells(sample, searched.nlist, folder, seed, device, progress)
        searched.quantizer.train(centroids)
        searched.quantizer.add(centroids)
    searched.train(sample)
    index.is_trained = True
    return index


def _with_transforms(index: Any, other: Any) -> Any:
    """`other`, an index that was read, with the index behind the transforms of `index`, a new one: how that is to be
    trained is not in the file."""
    index.own_fields, other.index = False, index.index
    return other


def _train_cells(
    sample: np.ndarray, cells: int, folder: Path, seed: int, device: torch.device, progress: bool
) -> np.ndarray:
    """Centroids (cells, d) float32 of `sample` (n, d) by k-means."""
    files = [folder / f"cells-{number:02d}.npy" for number in range(ITERATIONS)]
    done = len(list(itertools.takewhile(os.path.lexists, files)))
    if done:
        centroids = _read_array(files[done - 1], np.dtype(np.float32), (cells, sample.shape[1]))
        if not np.isfinite(centroids).all():
            raise _damaged(files[done - 1])
    else:
        centroids = sample[np.random.default_rng(seed).choice(len(sample), cells, replace=False)]
    with progress_bar(
        total=ITERATIONS, initial=done, desc=f"train {cells:,} cells", unit=" rounds", shown=progress
    ) as bar:
        for file in files[done:]:
            nearest, sums = NearestCell(centroids, device), torch.zeros(centroids.shape)
            counts = np.zeros(cells, np.int64)
            for rows in _blocks(0, len(sample)):
                found = nearest(sample[rows])
                counts += np.bincount(found, minlength=cells)
                sums.index_add_(0, torch.from_numpy(found), torch.from_numpy(sample[rows]))
            centroids = sums.numpy() / np.maximum(counts, 1)[:, None].astype(np.float32)
            split_largest(counts, centroids)
            _write_array(centroids, file)
            bar.update()
    return centroids


def split_largest(counts: np.ndarray, centroids: np.ndarray) -> None:
    """Gives each cell without vectors half of the largest, in place: its centroid, and that one, a little aside."""
    aside = np.full(centroids.shape[1], 1 / 1024, np.float32)
    aside[1::2] *= -1
    for empty in np.flatnonzero(counts == 0).tolist():
        largest = int(counts.argmax())
        centroids[empty], centroids[largest] = centroids[largest] * (1 + aside), centroids[largest] * (1 - aside)
        counts[empty] = counts[largest] // 2
        counts[largest] -= counts[empty]


def _fill(kb: ImageKnowledgeBase, index: Any, ivf: Any, parts: Path, device: torch.device, progress: bool) -> None:
    """Adds the vectors of `kb` to `index`, whose inverted file is `ivf`, by files whose names begin with `parts`."""
    faiss = import_faiss()
    transforms, _ = stages(index)
    nearest = NearestCell(ivf.quantizer.reconstruct_n(0, ivf.nlist), device)
    entry = np.dtype([("cell", np.int32), ("code", np.uint8, (ivf.code_size,))])
    starts = range(0, len(kb), PART_ROWS)
    files = [parts.with_name(f"{parts.name}-{number:05d}.npy") for number in range(len(starts))]
    with progress_bar(total=len(kb), desc="add", unit=" images", unit_scale=True, shown=progress) as bar:
        for start, file in zip(starts, files, strict=True):
            end = min(start + PART_ROWS, len(kb))
            if os.path.lexists(file):
                bar.update(end - start)
                bar.initial = bar.n  # the time left is that of what this process adds
                continue
            part = np.empty(end - start, entry)
            for rows in _blocks(start, end):
                vectors = kb.gather(rows).astype(np.float32)
                for transform in transforms:
                    vectors = transform.apply(vectors)
                cells = nearest(vectors)
                if (cells < 0).any():
                    raise _not_finite(kb)
                codes = np.empty((len(rows), ivf.code_size), np.uint8)
                ivf.encode_vectors(
                    len(rows), faiss.swig_ptr(vectors), faiss.swig_ptr(cells), faiss.swig_ptr(codes), False
                )
                part["cell"][rows - start], part["code"][rows - start] = cells, codes
                bar.update(len(rows))
            _write_array(part, file)
    filled = ivf if _has_plain_lists(ivf) else _unpacked(ivf)
    sizes = np.zeros(ivf.nlist, np.int64)
    for start, file in zip(starts, files, strict=True):
        cells = _read_array(file, entry, (min(PART_ROWS, len(kb) - start),))["cell"]
        if cells.min() < 0 or cells.max() >= ivf.nlist:
            raise _damaged(file)
        sizes += np.bincount(cells, minlength=ivf.nlist)
    for cell, size in enumerate(sizes.tolist()):  # a list that grows takes up to twice its memory
        filled.invlists.resize(cell, size)
    sizes[:] = 0
    for start, file in zip(starts, files, strict=True):
        part = _read_array(file, entry, (min(PART_ROWS, len(kb) - start),))
        order = part["cell"].argsort(kind="stable")
        cells, begins = np.unique(part["cell"][order], return_index=True)
        ids, codes = order.astype(np.int64) + start, np.ascontiguousarray(part["code"][order])
        for cell, begin, end in zip(cells.tolist(), begins.tolist(), [*begins[1:].tolist(), len(order)], strict=True):
            some = faiss.swig_ptr(ids[begin:end]), faiss.swig_ptr(codes[begin:end])
            filled.invlists.update_entries(cell, int(sizes[cell]), end - begin, *some)
            sizes[cell] += end - begin
    filled.ntotal = ivf.ntotal = index.ntotal = len(kb)
    if filled is not ivf:
        packed = faiss.IndexIVFPQFastScan(filled, ivf.bbs)
        packed.own_invlists = False
        ivf.replace_invlists(packed.invlists, True)


def _unpacked(ivf: Any) -> Any:
    """An empty index of the same cells and codes, not packed by the block as those of IndexIVFPQFastScan are."""
    faiss = import_faiss()
    plain = faiss.IndexIVFPQ(ivf.quantizer, ivf.d, ivf.nlist, ivf.pq.M, ivf.pq.nbits)
    plain.own_fields = False
    plain.pq, plain.by_residual, plain.is_trained = ivf.pq, ivf.by_residual, True
    return plain


def _blocks(start: int, end: int) -> Iterator[np.ndarray]:
    for first in range(start, end, ROWS):
        yield np.arange(first, min(first + ROWS, end))


def _not_finite(kb: ImageKnowledgeBase) -> ValmError:
    return ValmError(f"the knowledge base {kb.path} is damaged: a vector is not finite; build it again")


def _read_array(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    try:
        check_own(file)
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise _damaged(file) from error
    if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (dtype, shape):
        raise _damaged(file)
    return array


def _read_index(file: Path) -> Any:
    try:
        check_own(file)
        return import_faiss().read_index(str(file))
    except (ValueError, RuntimeError) as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> ValmError:
    return ValmError(f"{file} is damaged: delete its folder, and the index is made from the beginning")


def _write_array(array: np.ndarray, file: Path) -> None:
    with atomic_path(file) as temporary, temporary.open("wb") as opened:
        np.save(opened, array, allow_pickle=False)


def _write_index(index: Any, file: Path) -> None:
    with atomic_path(file) as temporary:
        write_index(index, temporary, file)


def write_index(index: Any, temporary: Path, file: Path) -> None:
    """Writes a faiss index to `temporary`, which is to become `file`.

    Raises:
        ValmError: it cannot be written.
    """
    faiss = import_faiss()
    try:
        # faiss's own file says nothing where its last bytes do not fit
        with temporary.open("wb") as opened:
            faiss.write_index(index, faiss.PyCallbackIOWriter(opened.write))
    except (OSError, RuntimeError) as error:  # the latter from inside faiss
        reason = "the disk is full, or does not let it be written"
        raise ValmError(f"cannot write {file}: {reason}; what was there is untouched") from error
