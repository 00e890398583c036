"""Exact top-K inner product compared with its alternatives. Each row's note is its recall of the float64 answer.

On CUDA the vectors are on the device and in float16; `bench_search_on_cuda` contains the searches that a GPU measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.peers.topk import CUDA_PEERS, PEERS, Search
from benchmarks.sizes import sized
from benchmarks.valm_kernels import roofline
from tests.valm_kernels.topk.databases import adversarial, normals
from valm_kernels import FlatIPIndex, ip_scores, ip_topk
from valm_kernels.topk import cuda, matmul


class Vectors(NamedTuple):
    rows: int = sized(200_000, 200)
    dim: int = 768
    cosine: float = 0.0  # mean cosine of two rows: CLIP's are far from 0
    decaying: bool = False  # the spectrum: the n-th principal axis has a share of 1 / n
    folder: Path | None = None  # holds rows.npy and queries.npy


class Case(NamedTuple):
    vectors: Vectors
    n_queries: int
    k: int = 8

    def __str__(self) -> str:
        rows, dim, cosine, decaying, folder = self.vectors
        kind = folder.name if folder else "decaying" if decaying else f"mean cosine {cosine}" if cosine else ""
        return f"N {rows / 1000:g}k E {dim} k {self.k} queries {self.n_queries} {kind}".rstrip()


N_50K, N_200K, N_1M = Vectors(sized(50_000, 50)), Vectors(), Vectors(sized(1_000_000, 1000))
QUICK = [Case(N_50K, n) for n in (1, 64)]
# the cases of docs/reference/topk.md
FULL = [
    *(Case(N_50K, n) for n in (16, 1024)),
    *(Case(N_200K, n) for n in (1, 16, 64, 256, 1024)),
    Case(N_200K, 64, 32),
    Case(Vectors(dim=512), 64),
    *(Case(Vectors(cosine=cosine), n) for cosine in (0.55, 0.8) for n in (1, 64, 1024)),
    *(Case(Vectors(decaying=True), n) for n in (1, 64)),
    *(Case(N_1M, n) for n in (1, 16, 64, 1024)),
]
HARD = ("ascending", "equal", "duplicates", "six decades", "hidden by an offset", "anisotropic", "outlier dimension")
# What a GPU measures: numbers of queries, a larger k, a k for which all rows are scored exactly, and longer rows.
CUDA_CASES = [
    *(Case(N_1M, n) for n in roofline.TOPK_QUERIES),
    *(Case(N_1M, n, 100) for n in (64, 1024)),
    Case(N_1M, 64, 200),
    *(Case(Vectors(dim=1024), n) for n in (64, 1024)),
]
# The number of queries that the float64 answer covers, from the first; it has the largest k.
CHECKED_QUERIES, LARGEST_K = 64, 200


PACKS, WITHOUT_NVCC = "ip_topk, packs per call", "FlatIPIndex without nvcc"


def index_search(database: Tensor) -> Search:
    index = FlatIPIndex(database)
    return lambda queries, k: index.search(queries, k).indices


def search_without_nvcc(database: Tensor) -> Search:
    """What an index on CUDA does if the native module contains no CUDA code."""
    norms = matmul.row_norms(database, None)
    return lambda queries, k: matmul.search(queries, database, None, norms, k)[1]


OURS: dict[str, Callable[[Tensor], Search]] = {
    "FlatIPIndex": index_search,
    PACKS: lambda database: lambda queries, k: ip_topk(queries, database, k).indices,
}
IMPLEMENTATIONS = {**OURS, **PEERS}
ON_CUDA = {**OURS, WITHOUT_NVCC: search_without_nvcc, **CUDA_PEERS}
DECAYING_PEERS = ("faiss IndexFlatIP, tuned", "faiss IndexFlatIPPanorama")


@lru_cache(maxsize=1)
def generate(vectors: Vectors, device: torch.device) -> tuple[Tensor, Tensor]:
    """A database and 4096 queries of unit length; on CUDA rounded to float16 before the answer is computed."""
    rows, dim, cosine, decaying, folder = vectors
    if folder is not None:
        own, queries = (torch.from_numpy(np.load(folder / name)).to(device) for name in ("rows.npy", "queries.npy"))
        return own, queries
    generator = torch.Generator(device).manual_seed(0)
    both = torch.randn(rows + 4096, dim, generator=generator, device=device)
    if decaying:
        both /= torch.arange(1, dim + 1, device=device).sqrt()
        both = both @ torch.linalg.qr(torch.randn(dim, dim, generator=generator, device=device)).Q
    both /= both.norm(dim=1, keepdim=True)
    if cosine:
        common = torch.randn(dim, generator=generator, device=device)
        both.mul_((1 - cosine) ** 0.5).add_(cosine**0.5 * common / common.norm())
        both /= both.norm(dim=1, keepdim=True)
    if device.type == "cuda":
        both = both.half()
    return both[:rows], both[rows:]


@lru_cache(maxsize=1)
def build(vectors: Vectors, name: str, device: torch.device) -> Search:
    return (IMPLEMENTATIONS | ON_CUDA)[name](generate(vectors, device)[0])


def best_rows(queries: Tensor, database: Tensor) -> Tensor:
    """The best rows of the first queries, in float64."""
    queries, k = queries[:CHECKED_QUERIES].double(), min(LARGEST_K, len(database))
    best = [(queries @ chunk.double().T).topk(min(k, len(chunk))) for chunk in database.split(50_000)]
    scores = torch.cat([b.values for b in best], 1)
    indices = torch.cat([b.indices + i * 50_000 for i, b in enumerate(best)], 1)
    return indices.gather(1, scores.topk(k).indices)


@lru_cache(maxsize=1)
def answer(vectors: Vectors, device: torch.device) -> Tensor:
    database, queries = generate(vectors, device)
    return best_rows(queries, database)


def worth_its_time(case: Case, name: str) -> bool:
    if name == "FlatIPIndex":
        return True
    if case.vectors.cosine:  # the speed of the others does not depend on the values
        return False
    if case.vectors.decaying:
        return name in DECAYING_PEERS
    # these search one query at a time, seconds per call
    return case.n_queries <= 64 or name not in ("faiss IndexFlatIPPanorama", "faiss fp16 quantizer", "usearch exact")


def parameters(cases: list[Case], names: Iterable[str], chosen: Callable[[Case, str], bool], marks: Any = ()) -> list:
    """Orders the cases so that each implementation is built once for the same vectors."""
    return [
        pytest.param(case, name, id=f"{case}-{name}", marks=marks)
        for vectors in dict.fromkeys(case.vectors for case in cases)
        for name in names
        for case in cases
        if case.vectors == vectors and chosen(case, name)
    ]


def measure_search(measure: Callable[..., None], device: torch.device, case: Case, name: str) -> None:
    queries = generate(case.vectors, device)[1][: case.n_queries]
    truth = answer(case.vectors, device)[: case.n_queries, : case.k]
    search = build(case.vectors, name, device)

    def recall(indices: Tensor) -> float:
        return (indices[: len(truth), :, None] == truth[:, None, :]).any(1).float().mean().item()

    def check(indices: Tensor) -> None:
        if name in OURS or name == WITHOUT_NVCC:
            assert torch.equal(indices[: len(truth)], truth)
        assert recall(indices) > 0.9

    measure(
        group=str(case),
        name=name,
        function=lambda given=queries: search(given, case.k),
        inputs=() if name == WITHOUT_NVCC else (queries,),  # it waits for the GPU, which no CUDA graph can hold
        check=check,
        note=lambda indices: f"recall {recall(indices):.4f}",
        arithmetic=roofline.topk_s(case.n_queries, case.vectors.rows, case.vectors.dim),
    )


@pytest.mark.parametrize(
    ("case", "name"),
    parameters(QUICK, IMPLEMENTATIONS, worth_its_time)
    + parameters(FULL, IMPLEMENTATIONS, worth_its_time, pytest.mark.full),
)
def bench_search(measure, device, case, name):
    if device.type != "cpu":
        pytest.skip("bench_search_on_cuda measures on CUDA")
    measure_search(measure, device, case, name)


def needs_native_code(device: torch.device) -> None:
    if device.type == "cuda" and not cuda.has_code(device):
        pytest.skip("the native module has no code for this GPU, so that PyTorch would search")


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    ("case", "name"),
    parameters(CUDA_CASES, ON_CUDA, lambda case, name: name != PACKS or case == Case(N_1M, 64)),
)
def bench_search_on_cuda(measure, device, case, name):
    if name in OURS:
        needs_native_code(device)
    measure_search(measure, device, case, name)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("rows", ["float16", "bfloat16", "int8", "float32", "float16, in host memory"])
@pytest.mark.parametrize("n_queries", [64, 1024])
def bench_rows_on_cuda(measure, device, n_queries, rows):
    """Rows of each type, and rows that are streamed because they do not fit into the GPU's memory."""
    needs_native_code(device)
    database, queries = generate(N_1M, device)
    queries = queries[:n_queries]
    dtype, _, place = rows.partition(", ")
    index = FlatIPIndex(database.cpu() if place else database, dtype, device, streamed=bool(place))
    truth = best_rows(queries, index.dequantised().to(device))[:, :8]

    def check(indices: Tensor) -> None:
        assert torch.equal(indices[: len(truth)], truth)

    measure(
        group=f"rows of each type, {Case(N_1M, n_queries)}",
        name=rows,
        function=lambda given=queries: index.search(given, 8).indices,
        inputs=() if place else (queries,),  # streaming waits for the GPU
        check=check,
        arithmetic=roofline.topk_s(n_queries, len(database), N_1M.dim) if rows in ("float16", "bfloat16") else None,
    )


@pytest.mark.parametrize("name", ("FlatIPIndex", *DECAYING_PEERS))
@pytest.mark.parametrize("n_queries", [1, 8, 64])
def bench_own_vectors(measure, device, pytestconfig, n_queries, name):
    """Rows (N, E) and at least 64 queries (Q, E) of your own, float32."""
    folder = pytestconfig.getoption("--vectors")
    if folder is None:
        pytest.skip("needs --vectors FOLDER")
    rows, dim = np.load(folder / "rows.npy", mmap_mode="r").shape
    measure_search(measure, device, Case(Vectors(rows, dim, folder=folder), n_queries), name)


@pytest.mark.parametrize("name", ("FlatIPIndex", "a sum of the same bytes"))
def bench_one_query_reads_as_fast_as_a_sum(measure, device, name):
    """One query over float16 rows, compared with a parallel sum of the same bytes."""
    database, queries = generate(N_200K, device)
    half = database.half()
    index, integers = FlatIPIndex(half), half.view(torch.int64)
    function, expected = {
        "FlatIPIndex": (lambda: index.search(queries[:1], 8).indices, ip_topk(queries[:1], half, 8).indices),
        "a sum of the same bytes": (integers.sum, int(integers.cpu().numpy().sum())),
    }[name]

    def check(found: Tensor) -> None:
        assert (found == expected).all()

    measure(group="one query over N 200k E 768 float16", name=name, function=function, check=check)


def gathered_einsum(queries: Tensor, rows: Tensor, query_ids: Tensor, row_ids: Tensor) -> Tensor:
    return torch.einsum("ne,ne->n", queries[query_ids], rows[row_ids].float())


def gathered_product(queries: Tensor, rows: Tensor, query_ids: Tensor, row_ids: Tensor) -> Tensor:
    """Loads each row once and computes its products with all queries."""
    unique, place = row_ids.unique(return_inverse=True)
    return (queries @ rows[unique].float().T)[query_ids, place]


@pytest.mark.parametrize("function", (ip_scores, gathered_einsum, gathered_product), ids=lambda f: f.__name__)
def bench_pairs(measure, device, function):
    """64 candidates for each of 512 queries, from a fifth of the rows: queries of one text share many candidates."""
    database, queries = generate(N_50K, device)
    rows, queries = database.half(), queries[:512].float()
    generator = torch.Generator().manual_seed(0)
    row_ids = torch.randint(len(rows) // 5, (512 * 64,), generator=generator).to(device).sort().values * 5
    query_ids = torch.randperm(512 * 64, generator=generator).to(device) % 512
    exact = (queries[query_ids].double() * rows[row_ids].double()).sum(1)

    def check(scores: Tensor) -> None:
        # a sum of float64 products rounded once, or of float32 products
        assert (scores - exact).abs().max() < (2**-24 if function is ip_scores else 1e-5)

    measure(
        group="scores of 512 x 64 pairs, N 50k E 768 float16",
        name=function.__name__,
        function=lambda: function(queries, rows, query_ids, row_ids),
        check=check,
    )


@pytest.mark.parametrize("kind", ("random", *HARD))
def bench_adversarial(measure, device, kind):
    """Rows that an adversary would choose, compared with random rows."""
    database, queries = generate(N_50K, device)
    queries = queries[:64]
    if kind != "random":
        database = adversarial(kind, len(database), 768).to(device)
    if kind == "ascending":  # queries near the query by which the rows are sorted
        queries = normals(768).to(device) + queries
    index = FlatIPIndex(database)
    expected = ip_topk(queries[:2], database, 8, impl="reference").indices

    def check(indices: Tensor) -> None:
        assert torch.equal(indices[:2], expected)

    measure(
        group="adversarial rows, N 50k E 768 k 8 queries 64",
        name=kind,
        function=lambda: index.search(queries, 8).indices,
        check=check,
    )
