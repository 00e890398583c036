"""Databases for the tests of the CUDA search, simulated and on a device."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adversarial(kind: str, rows: int, dim: int, dtype: str) -> torch.Tensor:
    """Float32 rows against the threshold, the pools, the bound or the tie rule, such that `dtype` can hold them."""
    random = normals(rows, dim, seed=1)
    by_score = (random @ normals(2, dim)[0]).argsort()
    scales = torch.logspace(-3, 3, rows)[torch.randperm(rows, generator=torch.Generator().manual_seed(2))]
    values = {
        "ascending": random[by_score],
        "descending": random[by_score.flip(0)],
        "equal": random[:1].repeat(rows, 1),
        "duplicates": random[torch.arange(rows) % 7],
        "six decades": random * scales[:, None],
        "hidden by an offset": random * 1e-3 + 100 * normals(1, dim, seed=2),
        "denormal": random * 1e-40,
        "tiny": random * 1e-30,
        "huge": random * 5e37,
        "overflow": random * 1e38,
        "integers": random.mul(2).round(),
        "zero": torch.zeros(rows, dim),
    }[kind].clamp(-3.38e38, 3.38e38)
    if dtype == "float16":
        if kind in ("denormal", "tiny", "huge", "overflow"):
            values = values / values.abs().max() * (1e-6 if kind in ("denormal", "tiny") else 6e4)
        values = values.clamp(-6e4, 6e4)
    return values


ADVERSARIAL = (
    "ascending",
    "descending",
    "equal",
    "duplicates",
    "six decades",
    "hidden by an offset",
    "denormal",
    "tiny",
    "huge",
    "overflow",
    "integers",
    "zero",
)
