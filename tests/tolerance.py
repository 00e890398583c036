"""The one rule for how far a result may be from the truth."""

from __future__ import annotations

import torch
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
