"""How far a result may be from the truth, and two ways to compute the same from each other."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def assert_accurate(
    name: str,
    actual: Tensor,
    eager: Tensor,
    reference: Tensor,
    precision: torch.dtype | None = None,
    times: float = 2,
    units: float = 1,
) -> None:
    """`actual` may be twice (`times`) as wrong as eager code of the same precision plus a unit in the last place, or
    `units` of them.

    `reference` is the float64 truth and `eager` what plain PyTorch gives in the dtype of `actual` for the same
    input. Both the largest and the RMS error are held to it; the unit is that of the output dtype at
    max|reference|, or that of `precision` for a wider output of coarser arithmetic (the float32 gradient of a
    bias beside 16-bit tensors). Where the reference is -inf, actual has to be -inf too.
    """
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} NaN of {actual.numel()}"
    finite = reference.isfinite()
    assert actual[~finite].double().equal(reference[~finite]), f"{name}: wrong values where the reference is infinite"
    if not finite.any():
        return
    truth = reference[finite]
    error, eager_error = ((t[finite].double() - truth).abs() for t in (actual, eager))
    ulp = units * torch.finfo(precision or actual.dtype).eps * truth.abs().max()
    for kind, measure in (("largest", torch.max), ("RMS", lambda e: e.square().mean().sqrt())):
        found, allowed = measure(error), times * (measure(eager_error) + ulp)
        assert found <= allowed, (
            f"{name}: {kind} error {found:.3e}, allowed {allowed:.3e} (eager {measure(eager_error):.3e}, ulp {ulp:.3e})"
        )


# Of sums in the precision itself; 16-bit kernels sum in float32 and round once.
ROUNDINGS = {torch.float64: 256, torch.float32: 256, torch.bfloat16: 4, torch.float16: 4}
# Between two float32 products of the same unit vectors, computed in other batches.
UNIT_VECTORS = 2**-22


def assert_agree(actual: Tensor | ArrayLike, expected: Tensor | ArrayLike, name: str = "") -> None:
    """Two ways to compute the same, such as with a cache and without: they differ by rounding, at most by ROUNDINGS
    units in the last place of the largest value, in the coarser precision of the two.

    What is no tensor was computed in float32, such as the losses of a log. A single number is expected everywhere.
    """
    actual, expected = (
        one if isinstance(one, Tensor) else torch.from_numpy(np.asarray(one, np.float32)) for one in (actual, expected)
    )
    expected = expected.expand(actual.shape) if expected.dim() == 0 else expected
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    finite = expected.isfinite()
    assert actual[~finite].double().equal(expected[~finite].double()), f"{name}: wrong where it should be infinite"
    if not finite.any():
        return
    precision = max(actual.dtype, expected.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    found, truth = actual[finite].double(), expected[finite].double()
    error, unit = (found - truth).abs().max(), torch.finfo(precision).eps * truth.abs().max()
    assert error <= ROUNDINGS[precision] * unit, f"{name}: off by {error:.3e}, which is {error / unit:.0f} units"
