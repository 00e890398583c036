"""The alternatives for top-K inner product.

Each entry takes a float32 database (N, E) and returns a search. The search takes float32 queries (Q, E) and k, and
returns indices (Q, k).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.peers.optional import optional_module

Search = Callable[[Tensor, int], Tensor]


def torch_float32(database: Tensor) -> Search:
    return lambda queries, k: (queries @ database.T).topk(k).indices


def torch_bfloat16(database: Tensor) -> Search:
    rounded = database.bfloat16()
    return lambda queries, k: (queries.bfloat16() @ rounded.T).topk(k).indices


def torch_float16(database: Tensor) -> Search:
    rounded = database.half()
    return lambda queries, k: (queries.half() @ rounded.T).topk(k).indices


# From this many query elements on, faiss multiplies matrices; below, it computes dot products one by one.
FAISS_TUNED_BLAS_THRESHOLD = 1


@cache
def faiss_blas_threshold() -> int:
    """faiss's default, read before anything here changes it."""
    import faiss

    return faiss.cvar.distance_compute_blas_threshold


# Parts of a row; after each, Panorama decides whether to continue.
PANORAMA_LEVELS = 8


def _faiss_search(index: object, *, tuned: bool = False) -> Search:
    import faiss

    default = faiss_blas_threshold()
    threshold = FAISS_TUNED_BLAS_THRESHOLD if tuned else default
    faiss.omp_set_num_threads(torch.get_num_threads())

    def search(queries: Tensor, k: int) -> Tensor:
        faiss.cvar.distance_compute_blas_threshold = threshold
        return torch.from_numpy(index.search(queries.numpy(), k)[1])

    return search


def faiss_of_valm() -> ModuleType:
    """faiss as valm imports it: on some processors its products are then five times faster."""
    try:
        from valm.retrieval.index_parameters import import_faiss

        return import_faiss()
    except ImportError:
        pytest.skip("faiss is not installed")


def _faiss_flat(database: Tensor, *, tuned: bool) -> Search:
    faiss = faiss_of_valm()
    index = faiss.IndexFlatIP(database.shape[1])
    index.add(database.numpy())
    return _faiss_search(index, tuned=tuned)


def faiss_flat(database: Tensor) -> Search:
    return _faiss_flat(database, tuned=False)


def faiss_flat_tuned(database: Tensor) -> Search:
    return _faiss_flat(database, tuned=True)


def faiss_float16(database: Tensor) -> Search:
    faiss = faiss_of_valm()
    quantizer = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexScalarQuantizer(database.shape[1], quantizer, faiss.METRIC_INNER_PRODUCT)
    index.add(database.numpy())
    return _faiss_search(index)


def faiss_panorama(database: Tensor) -> Search:
    """faiss's exact search that leaves a row once its remainder cannot matter (Panorama, arXiv 2510.00566). The rows
    are rotated to their principal axes, so that the remainder is small after the first numbers."""
    faiss = faiss_of_valm()
    if not hasattr(faiss, "IndexFlatIPPanorama"):
        pytest.skip("this faiss has no Panorama: install faiss-cpu 1.15 or newer")
    axes = torch.linalg.eigh(database.T @ database).eigenvectors.flip(1)  # largest share first
    index = faiss.IndexFlatIPPanorama(database.shape[1], PANORAMA_LEVELS)
    index.add((database @ axes).numpy())
    search = _faiss_search(index)
    return lambda queries, k: search(queries @ axes, k)


def usearch_exact(database: Tensor) -> Search:
    usearch = optional_module("usearch.index", "usearch")
    rows, threads = database.numpy(), torch.get_num_threads()

    def search(queries: Tensor, k: int) -> Tensor:
        found = usearch.search(rows, queries.numpy(), k, usearch.MetricKind.IP, exact=True, threads=threads)
        return torch.from_numpy(np.atleast_2d(found.keys).astype(np.int64))

    return search


def faiss_gpu_float16(database: Tensor) -> Search:
    """faiss's exact search on the device of the database, which takes and returns tensors there."""
    faiss = optional_module("faiss", "faiss")
    if faiss.get_num_gpus() == 0:
        pytest.skip("this faiss has no GPUs: install valm[gpu] instead of valm[faiss]")
    import faiss.contrib.torch_utils  # faiss's methods take tensors from now on

    config = faiss.GpuIndexFlatConfig()
    config.useFloat16, config.device = True, database.device.index
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), database.shape[1], config)
    for part in database.split(1 << 16):
        index.add(part.float())
    return lambda queries, k: index.search(queries.float(), k)[1]


def cuvs_float16(database: Tensor) -> Search:
    """cuVS's exact search on the device of the database."""
    brute_force = optional_module("cuvs.neighbors.brute_force", "cuVS (cuvs)")
    index = brute_force.build(database, metric="inner_product")

    def search(queries: Tensor, k: int) -> Tensor:
        return torch.as_tensor(brute_force.search(index, queries, k)[1], device=queries.device)

    return search


# By the device on which they are measured.
PEERS: dict[str, Callable[[Tensor], Search]] = {
    "torch float32 mm + topk": torch_float32,
    "torch bfloat16 mm + topk": torch_bfloat16,
    "faiss IndexFlatIP": faiss_flat,
    "faiss IndexFlatIP, tuned": faiss_flat_tuned,
    "faiss IndexFlatIPPanorama": faiss_panorama,
    "faiss fp16 quantizer": faiss_float16,
    "usearch exact": usearch_exact,
}
CUDA_PEERS: dict[str, Callable[[Tensor], Search]] = {
    "torch float16 mm + topk": torch_float16,
    "faiss-gpu IndexFlatIP float16": faiss_gpu_float16,
    "cuVS brute force float16": cuvs_float16,
}
