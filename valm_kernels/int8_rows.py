"""What a linear layer in int8 does on CPU before and after its integer products, each in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import cpu_isa, native, survives_fork


@survives_fork
def round_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds each row to 256 steps from its least to its largest value: rows ~ zero + step * rounded.

    Bit for bit what these operations of PyTorch compute of finite rows:

        least, largest = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        step = ((largest - least) / 255).clamp(min=torch.finfo(torch.float32).tiny)
        rounded = ((rows - least) / step).round().sub(128).to(torch.int8)
        zero = least + 128 * step

    Args:
        rows: (n, W) float32 on CPU, without a gradient.

    Returns:
        rounded (n, W) int8; step (n,) and zero (n,) float32, both NaN where a row holds a NaN or an infinity.

    Raises:
        ValueError: rows are something else, or W is 0.
    """
    if rows.dtype != torch.float32 or rows.dim() != 2 or rows.device.type != "cpu" or rows.shape[1] == 0:
        raise ValueError(
            f"rows must be float32 (n, W) on CPU with W > 0, got {rows.dtype} {tuple(rows.shape)} on {rows.device}"
        )
    if rows.requires_grad and torch.is_grad_enabled():
        raise ValueError("rounding has no gradient: call it under torch.no_grad()")
    rows = rows.contiguous()
    rounded = torch.empty_like(rows, dtype=torch.int8)
    step, zero = rows.new_empty(2, len(rows))
    native().round_rows(
        cpu_isa(),
        torch.get_num_threads(),
        rows.data_ptr(),
        *rows.shape,
        rounded.data_ptr(),
        step.data_ptr(),
        zero.data_ptr(),
    )
    return rounded, step, zero


@survives_fork
def scale_products_(products: Tensor, step: Tensor, zero: Tensor, scale: Tensor, sum: Tensor, bias: Tensor) -> Tensor:
    """bias + step * scale * products + zero * sum, in the memory of `products`.

    Args:
        products: (n, N) int32 on CPU, contiguous, of rounded rows and rounded weights. Holds the result afterwards.
        step, zero: (n,) float32, of the rows.
        scale, sum, bias: (N,) float32, of the weights.

    Returns:
        (n, N) float32, a view of `products`.

    Raises:
        ValueError: a tensor is of another dtype or shape, not contiguous or not on CPU.
    """
    rows, columns = products.shape[0], products.shape[-1]
    given = {
        "products": (products, torch.int32, (rows, columns)),
        "step": (step, torch.float32, (rows,)),
        "zero": (zero, torch.float32, (rows,)),
        "scale": (scale, torch.float32, (columns,)),
        "sum": (sum, torch.float32, (columns,)),
        "bias": (bias, torch.float32, (columns,)),
    }
    for name, (tensor, dtype, shape) in given.items():
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be {dtype} {shape} on CPU and contiguous, got {tensor.dtype} {tuple(tensor.shape)} with "
                f"strides {tensor.stride()} on {tensor.device}"
            )
    native().scale_products(
        cpu_isa(),
        torch.get_num_threads(),
        products.data_ptr(),
        rows,
        columns,
        step.data_ptr(),
        zero.data_ptr(),
        scale.data_ptr(),
        sum.data_ptr(),
        bias.data_ptr(),
    )
    return products.view(torch.float32)
