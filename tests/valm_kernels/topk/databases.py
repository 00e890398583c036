"""Databases for the tests of exact search: random ones, and those that defeat a threshold, a bound or a tie rule."""

from __future__ import annotations

import torch

ADVERSARIAL = (
    "ascending",
    "descending",
    "equal",
    "duplicates",
    "nearly equal",
    "six decades",
    "hidden by an offset",
    "anisotropic",
    "denormal",
    "tiny",
    "huge",
    "outlier dimension",
    "integers",
    "zero",
)


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adversarial(kind: str, rows: int, dim: int) -> torch.Tensor:
    """A float32 database (rows, dim); "ascending" and "descending" are sorted by their score with normals(dim)."""
    random = normals(rows, dim, seed=1)
    if kind in ("ascending", "descending"):
        return random[(random @ normals(dim)).argsort(descending=kind == "descending")]
    if kind == "equal":
        return random[:1].repeat(rows, 1)
    if kind == "duplicates":
        return random[torch.arange(rows) % 7]
    if kind == "nearly equal":  # apart by less than a score's last bit
        return normals(1, dim, seed=2) * (1 + 1e-7 * random.sign())
    if kind == "six decades":
        exponents = torch.linspace(-3, 3, rows)[torch.randperm(rows, generator=torch.Generator().manual_seed(3))]
        return random * 10 ** exponents[:, None]
    if kind == "hidden by an offset":
        return random * 1e-3 + 100 * normals(1, dim, seed=2)
    if kind == "anisotropic":
        return random + 2 * normals(1, dim, seed=2)
    if kind == "outlier dimension":
        random[:, 3] *= 300
        return random
    if kind == "integers":  # many exact ties between different rows
        return random.mul(2).round()
    if kind == "zero":
        return torch.zeros(rows, dim)
    return random * {"denormal": 1e-40, "tiny": 1e-25, "huge": 5e37}[kind]
