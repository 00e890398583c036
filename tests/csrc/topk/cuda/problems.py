"""Databases for the tests of the CUDA search, simulated and on a device."""

from __future__ import annotations

from torch import Tensor

from tests.valm_kernels.topk import databases
from tests.valm_kernels.topk.databases import normals

ADVERSARIAL = (*databases.ADVERSARIAL, "overflow")


def adversarial(kind: str, rows: int, dim: int, dtype: str) -> Tensor:
    """Float32 rows that attack the threshold, the pools, the bound or the tie rule, exact in `dtype`."""
    if kind == "overflow":
        values = (1e38 * normals(rows, dim, seed=1)).clamp(-3.38e38, 3.38e38)
    else:
        values = databases.adversarial(kind, rows, dim)
    if dtype == "float16":
        if kind in ("denormal", "tiny", "huge", "overflow"):
            values = values / values.abs().max() * (1e-6 if kind in ("denormal", "tiny") else 6e4)
        values = values.clamp(-6e4, 6e4)
    return values
