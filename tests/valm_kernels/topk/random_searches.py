"""Random searches with all options of `FlatIPIndex` and `ip_topk`, compared with float64."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from tests.valm_kernels.topk.databases import ADVERSARIAL, adversarial, normals
from valm_kernels import FlatIPIndex, TopK, ip_scores, ip_topk, merge_topk

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_search(number: int) -> list[str]:
    """Runs search `number`, and returns its special features.

    Raises:
        AssertionError: its result differs from the definition, or from float64 by more than its rounding.
    """
    draw = random.Random(f"search {number}")
    chance = draw.random
    kind = draw.choice(("normal", *ADVERSARIAL))
    count = draw.choice((draw.randint(1, 40), draw.randint(1, 700), draw.randint(1, 4000)))
    dim = draw.choice((8, draw.randint(8, 100), draw.randint(8, 400), draw.choice((768, 2048))))
    count = min(count, 1 + 400_000 // dim)
    rows = normals(count, dim, seed=number) if kind == "normal" else adversarial(kind, count, dim)
    stored = draw.choice((*DTYPES, "int8"))
    if stored == "float16":  # float16 has no larger numbers
        rows = rows.clamp(-6e4, 6e4)
    k = draw.choice((1, draw.randint(1, min(count, 20)), draw.randint(1, min(count, 1024))))
    queries = _queries(draw, rows, number)
    ids = torch.randperm(3 * count, generator=torch.Generator().manual_seed(number))[:count] if chance() < 0.3 else None
    allowed = None
    if chance() < 0.3:
        allowed = torch.rand(count, generator=torch.Generator().manual_seed(number)) < chance()

    option = draw.choice(("packed", "packed", "not packed", "streamed", "sharded", "changed", "saved", "raw"))
    if option in ("raw", "sharded"):
        ids = None
    index = FlatIPIndex(rows, stored, ids=ids)
    searched = index.dequantised()
    if option == "raw":
        rows = rows.to(DTYPES.get(stored, torch.float32))
        searched = rows.float()
        found = ip_topk(queries, rows, k, allowed=allowed)
    elif option == "sharded":
        bounds = _bounds(count, min(count, draw.randint(1, 4)))
        parts = [(FlatIPIndex(rows[a:b], stored), None if allowed is None else allowed[a:b]) for a, b in bounds]
        results = [part.search(queries, min(k, len(part)), allowed=some) for part, some in parts]
        found = merge_topk(results, [a for a, _ in bounds], k)
    else:
        if option == "changed":
            index = _changed(draw, rows, stored, ids)
        elif option == "saved":
            index = _saved(index, draw)
        elif option != "packed":
            options = {"pack": False} if option == "not packed" else {"streamed": True}
            index = FlatIPIndex(rows, stored, ids=ids, **options)
        found = index.search(queries, k, allowed=allowed)
    _check(found, queries, searched, k, ids, allowed)
    return [stored, option, *(["k over 128"] if k > 128 else []), *(["allowed"] if allowed is not None else [])]


def _bounds(count: int, parts: int) -> list[tuple[int, int]]:
    return list(pairwise(count * number // parts for number in range(parts + 1)))


def _queries(draw: random.Random, rows: Tensor, seed: int) -> Tensor:
    """Queries (Q, E): normal, rows of the database, zeros, very large or small, and not finite."""
    count = draw.choice((0, 1, draw.randint(1, 8), draw.randint(1, 40)))
    queries = normals(count, rows.shape[1], seed=seed + 1)
    for number in range(count):
        kind = draw.choice(("normal", "normal", "a row", "zero", "denormal", "huge", "broken"))
        if kind == "a row":
            queries[number] = rows[draw.randrange(len(rows))]
        elif kind == "broken":
            queries[number, draw.randrange(rows.shape[1])] = draw.choice((torch.nan, torch.inf, -torch.inf))
        else:
            queries[number] *= {"normal": 1.0, "zero": 0.0, "denormal": 1e-41, "huge": 1e37}[kind]
    return queries.to(DTYPES[draw.choice(("float32", "float32", *DTYPES))])


def _changed(draw: random.Random, rows: Tensor, stored: str, ids: Tensor | None) -> FlatIPIndex:
    """The index of `rows`, after some were added and others removed."""
    first = draw.randint(1, len(rows))
    extra = draw.randint(1, 5)  # at the front, so that it is removed by its numbers
    numbers = torch.arange(3 * len(rows), 3 * len(rows) + extra)
    begin = torch.cat([normals(extra, rows.shape[1]), rows[:first]])
    index = FlatIPIndex(begin, stored, ids=None if ids is None else torch.cat([numbers, ids[:first]]))
    index.search(normals(1, rows.shape[1]), 1)
    index.add(rows[first:], None if ids is None else ids[first:])
    index.remove(torch.arange(extra) if ids is None else numbers)
    return index


def _saved(index: FlatIPIndex, draw: random.Random) -> FlatIPIndex:
    with TemporaryDirectory() as folder:
        index.save(Path(folder))
        return FlatIPIndex.load(Path(folder), mmap=draw.random() < 0.5)


def _check(found: TopK, queries: Tensor, rows: Tensor, k: int, ids: Tensor | None, allowed: Tensor | None) -> None:
    expected = ip_topk(queries, rows, k, impl="reference", allowed=allowed)
    numbers = expected.indices
    if ids is not None:
        numbers = torch.where(numbers < 0, -1, ids[numbers.clamp(min=0)])
    assert torch.equal(found.indices, numbers), "other rows than the definition's"
    same = (found.scores == expected.scores) | (found.scores.isnan() & expected.scores.isnan())
    assert same.all(), "other scores than the definition's"

    # the definition computed differently: products and sums in float64, in PyTorch's order
    exact = queries.double() @ rows.double().T  # (Q, N)
    slack = 2**-50 * rows.shape[1] * (queries.double().abs() @ rows.double().abs().T)
    rounded = exact.float()
    rounding = slack + 2**-23 * exact.abs() + 2**-149
    excluded = torch.zeros(len(rows), dtype=torch.bool) if allowed is None else ~allowed
    for query, (scores, places) in enumerate(zip(*expected, strict=True)):
        if not queries[query].isfinite().all():
            assert scores.isnan().all() and (places == -1).all(), "a query that is not finite has results"
            continue
        taken = places[places >= 0]
        assert len(taken) == min(k, int((~excluded).sum())), "not as many rows as there are"
        assert len(taken.unique()) == len(taken), "a row is returned twice"
        assert not excluded[taken].any() and (scores[len(taken) :] == -torch.inf).all()
        off = (scores[: len(taken)].double() - exact[query, taken]).abs()
        overflow = ~rounded[query, taken].isfinite() & (scores[: len(taken)] == rounded[query, taken])
        assert (overflow | (off <= rounding[query, taken])).all(), "a score is not the float64 sum, rounded"
        left = ~excluded
        left[taken] = False
        if len(taken) and left.any():
            best = exact[query, left] - rounding[query, left]
            assert (best.float() <= scores[len(taken) - 1]).all(), "a better row is missing"
        pairs = ip_scores(queries[query : query + 1].float(), rows, torch.zeros_like(taken), taken)
        assert torch.equal(pairs, scores[: len(taken)]), "ip_scores differs from the search"
