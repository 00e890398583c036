"""Tolerances: of a result against the truth, and between two ways to compute one result."""

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
    """Asserts that the error of `actual` is at most `times` the sum of eager's error and `units` in the last place.

    This holds for the largest and for the RMS error. A unit in the last place is one of `precision` (by default the
    dtype of `actual`) at max|reference|. If the reference is -inf, `actual` must be -inf too.

    Args:
        reference: the float64 truth.
        eager: the result of plain PyTorch in the dtype of `actual` on the same input.
        precision: of the arithmetic, if the output is wider: for the float32 gradient of a bias of 16-bit tensors.
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


# Units in the last place, for sums in the precision itself. 16-bit kernels sum in float32 and round once.
ROUNDINGS = {torch.float64: 256, torch.float32: 256, torch.bfloat16: 4, torch.float16: 4}
# Difference of two float32 products of the same unit vectors, computed in different batches.
UNIT_VECTORS = 2**-22


def assert_agree(actual: Tensor | ArrayLike, expected: Tensor | ArrayLike, name: str = "") -> None:
    """Asserts that two ways to compute one result, such as with and without a cache, differ only by rounding.

    They may differ by ROUNDINGS units in the last place of the largest value, in the coarser precision of the two. An
    argument that is no tensor counts as float32, as the losses of a log. A single expected number is expected
    everywhere.
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
