"""Databases for the tests of exact search: random, and adversarial to a threshold, a bound or a tie rule.

Also a comparison of two answers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _by_score(rows: Tensor, descending: bool) -> Tensor:
    return rows[(rows @ normals(rows.shape[1])).argsort(descending=descending)]


def _scales(count: int) -> Tensor:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    return 10 ** torch.linspace(-3, 3, count)[order][:, None]


def _one_row(rows: Tensor) -> Tensor:
    return normals(1, rows.shape[1], seed=2)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {  # from random rows
    "ascending": lambda rows: _by_score(rows, descending=False),
    "descending": lambda rows: _by_score(rows, descending=True),
    "equal": lambda rows: rows[:1].repeat(len(rows), 1),
    "duplicates": lambda rows: rows[torch.arange(len(rows)) % 7],
    # scores that differ by less than the last bit
    "nearly equal": lambda rows: _one_row(rows) * (1 + 1e-7 * rows.sign()),
    "six decades": lambda rows: rows * _scales(len(rows)),
    "hidden by an offset": lambda rows: rows * 1e-3 + 100 * _one_row(rows),
    "anisotropic": lambda rows: rows + 2 * _one_row(rows),
    "denormal": lambda rows: rows * 1e-40,
    "tiny": lambda rows: rows * 1e-25,
    "huge": lambda rows: rows * 5e37,
    "outlier dimension": lambda rows: torch.where(torch.arange(rows.shape[1]) == 3, 300 * rows, rows),
    # many exact ties between different rows
    "integers": lambda rows: rows.mul(2).round(),
    "zero": torch.zeros_like,
}
ADVERSARIAL = tuple(KINDS)


def adversarial(kind: str, rows: int, dim: int) -> Tensor:
    """A float32 database (rows, dim); "ascending" and "descending" are sorted by their score with normals(dim)."""
    return KINDS[kind](normals(rows, dim, seed=1))


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Compares scores and rows bit for bit. Only a query that is not finite has NaN scores; it gets no rows."""
    scores, rows = expected
    assert torch.equal(actual[1], rows)
    torch.testing.assert_close(actual[0], scores, rtol=0, atol=0, equal_nan=True)
    assert not scores[rows >= 0].isnan().any()
