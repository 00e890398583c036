"""Exact top-K inner product on the CPU, beside what others would use; each row's note is its recall of the float64
answer. The sizes vary one at a time around N 200k, E 768, k 8 (50k without --full).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.peers.topk import PEERS, Search
from tests.valm_kernels.topk.databases import adversarial, normals
from valm_kernels import FlatIPIndex, ip_topk


class Case(NamedTuple):
    n_queries: int
    rows: int = 200_000
    dim: int = 768
    k: int = 8
    cosine: float = 0.0  # mean cosine of two rows: CLIP's are far from 0

    def __str__(self) -> str:
        cosine = f" mean cosine {self.cosine}" if self.cosine else ""
        return f"N {self.rows // 1000}k E {self.dim} k {self.k} queries {self.n_queries}{cosine}"


QUICK = [Case(n, rows=50_000) for n in (1, 16, 256)]
FULL = [
    *(Case(n) for n in (1, 16, 64, 166, 256, 1024, 4096)),
    *(Case(n, cosine=cosine) for cosine in (0.55, 0.8) for n in (1, 16, 64, 256, 1024)),
    *(Case(64, k=k) for k in (4, 32)),
    *(Case(n, dim=512) for n in (1, 64, 1024)),
    *(Case(n, rows=1_000_000) for n in (1, 64, 256)),
]
QUICK_ADVERSARIAL = ("ascending", "equal", "duplicates", "six decades", "hidden by an offset", "anisotropic")


def index_search(database: Tensor, **options: str) -> Search:
    index = FlatIPIndex(database, **options)
    return lambda queries, k: index.search(queries, k).indices


OURS: dict[str, Callable[[Tensor], Search]] = {
    "FlatIPIndex": index_search,
    "ip_topk, packs per call": lambda database: lambda queries, k: ip_topk(queries, database, k).indices,
}
IMPLEMENTATIONS = {**OURS, **PEERS}


@lru_cache(maxsize=1)
def vectors(rows: int, dim: int, cosine: float) -> tuple[Tensor, Tensor]:
    """A database and 4096 queries of unit length."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(rows + 4096, dim, generator=generator)
    both /= both.norm(dim=1, keepdim=True)
    if cosine:
        common = torch.randn(dim, generator=generator)
        both.mul_((1 - cosine) ** 0.5).add_(cosine**0.5 * common / common.norm())
        both /= both.norm(dim=1, keepdim=True)
    return both[:rows], both[rows:]


@lru_cache(maxsize=1)
def answer(case: Case) -> Tensor:
    """The k best rows of the first queries, in float64."""
    database, queries = vectors(case.rows, case.dim, case.cosine)
    queries = queries[: min(case.n_queries, 64)].double()
    chunks = database.split(50_000)
    best = [(queries @ chunk.double().T).topk(case.k) for chunk in chunks]
    scores = torch.cat([b.values for b in best], 1)
    indices = torch.cat([b.indices + i * 50_000 for i, b in enumerate(best)], 1)
    return indices.gather(1, scores.topk(case.k).indices)


@cache
def cases() -> list:
    quick = [pytest.param(case, name, id=f"{case}-{name}") for case in QUICK for name in IMPLEMENTATIONS]
    full = [
        pytest.param(case, name, id=f"{case}-{name}", marks=pytest.mark.full)
        for case in FULL
        for name in IMPLEMENTATIONS
        # one query at a time, these take seconds a call
        if not (case.n_queries > 64 and name in ("faiss fp16 quantizer", "usearch exact"))
    ]
    return quick + full


@pytest.mark.parametrize(("case", "name"), cases())
def bench_search(measure, case, name):
    database, queries = vectors(case.rows, case.dim, case.cosine)
    queries = queries[: case.n_queries]
    search = IMPLEMENTATIONS[name](database)
    truth = answer(case)
    found = search(queries, case.k)[: len(truth)]
    recall = (found[:, :, None] == truth[:, None, :]).any(1).float().mean().item()

    def check(indices: Tensor) -> None:
        if name in OURS:
            assert torch.equal(indices[: len(truth)], truth)
        assert recall > 0.9

    large = case.n_queries * case.rows >= 64 * 200_000
    measure(
        group=str(case),
        name=name,
        function=lambda: search(queries, case.k),
        check=check,
        flop=2.0 * case.n_queries * case.rows * case.dim,
        rounds=3 if large else 10,
        note=f"recall {recall:.4f}",
    )


@pytest.mark.parametrize("name", ("FlatIPIndex", "a sum of the same bytes"))
def bench_one_query_reads_as_fast_as_a_sum(measure, name):
    """One query over float16 rows, against a parallel sum of the same bytes."""
    database, queries = vectors(200_000, 768, 0.0)
    half = database.half()
    if name == "FlatIPIndex":
        index = FlatIPIndex(half)
        expected = ip_topk(queries[:1], half, 8).indices

        def function() -> Tensor:
            return index.search(queries[:1], 8).indices

    else:
        integers = half.view(torch.int64)
        expected = integers.numpy().sum()
        function = integers.sum

    def check(found: Tensor) -> None:
        assert (found == expected).all()

    measure(
        group="one query over N 200k E 768 float16",
        name=name,
        function=function,
        check=check,
        bytes_moved=half.nbytes,
        rounds=20,
    )


@pytest.mark.parametrize("kind", ("random", *QUICK_ADVERSARIAL))
def bench_adversarial(measure, kind):
    """What an adversary can do to the search, beside random rows."""
    database, queries = vectors(50_000, 768, 0.0)
    queries = queries[:64]
    if kind != "random":
        database = adversarial(kind, 50_000, 768)
    if kind == "ascending":  # queries near the one that the rows are sorted by
        queries = normals(768) + queries
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
