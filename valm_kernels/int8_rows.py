"""Linear layers in int8 on CPU: the steps before and after PyTorch's integer products, each in one pass over memory,
and one native call that does everything for a few rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .native import cpu_isa, native, survives_fork


class Int8Layer(NamedTuple):
    """A linear layer as `linear_rows` takes it: weight (N, W) int8; scale, sum and bias (N,) float32."""

    weight: Tensor
    scale: Tensor
    sum: Tensor
    bias: Tensor


def has_avx2() -> bool:
    """Whether the native products of int8 and float32 are faster than PyTorch's for a few rows."""
    return cpu_isa() not in ("generic", "tiles")


def has_vnni() -> bool:
    """Whether PyTorch multiplies int8 faster than float32."""
    return cpu_isa() in ("avx512vnni", "amxint8")


def is_int8_fast() -> bool:
    """Whether int8 reads a text as fast as float32 and the next tokens faster. False on AVX-512 without VNNI."""
    return has_vnni() or cpu_isa() == "avx2"


@survives_fork
def round_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds each row to 256 steps from its least to its largest value: rows ~ zero + step * rounded.

    For finite rows the result equals these operations of PyTorch bit for bit:

        least, largest = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        step = ((largest - least) / 255).clamp(min=torch.finfo(torch.float32).tiny)
        rounded = ((rows - least) / step).round().sub(128).to(torch.int8)
        zero = least + 128 * step

    Args:
        rows: (n, W) float32 on CPU, without a gradient.

    Returns:
        rounded (n, W) int8; step (n,) and zero (n,) float32, both NaN for a row with NaN or infinity.

    Raises:
        ValueError: rows have another dtype, shape or device, or W is 0.
    """
    rows = _checked(rows)
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
        products: (n, N) int32 on CPU, contiguous: rounded rows times rounded weights. Holds the result afterwards.
        step, zero: (n,) float32, of the rows.
        scale, sum, bias: (N,) float32, of the weights.

    Returns:
        (n, N) float32, a view of `products`.

    Raises:
        ValueError: a tensor has another dtype or shape, is not contiguous or is not on CPU.
    """
    rows, columns = products.shape[0], products.shape[-1]
    check_tensor("products", products, torch.int32, (rows, columns))
    for name, tensor in (("step", step), ("zero", zero)):
        check_tensor(name, tensor, torch.float32, (rows,))
    for name, tensor in (("scale", scale), ("sum", sum), ("bias", bias)):
        check_tensor(name, tensor, torch.float32, (columns,))
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


@survives_fork
def linear_rows(rows: Tensor, weight: Tensor, scale: Tensor, sum: Tensor, bias: Tensor) -> Tensor:
    """`round_rows`, the products with the weights and `scale_products_` in one call, bit for bit.

    For a few rows, reading the weights takes most of the time, and this call reads them once. For many rows, PyTorch's
    products are faster if the processor supports VNNI, and slower if it does not.

    Args:
        rows: (n, W) float32 on CPU, without a gradient.
        weight: (N, W) int8, contiguous.
        scale, sum, bias: (N,) float32, of the weights.

    Returns:
        (n, N) float32.

    Raises:
        ValueError: a tensor has another dtype or shape or is not on CPU, or a weight is not contiguous.
    """
    rows = _checked(rows)
    outputs, width = weight.shape[0], rows.shape[1]
    check_layer(Int8Layer(weight, scale, sum, bias), outputs, width)
    out = rows.new_empty(len(rows), outputs)
    native().linear_rows(
        cpu_isa(),
        torch.get_num_threads(),
        rows.data_ptr(),
        *rows.shape,
        weight.data_ptr(),
        outputs,
        scale.data_ptr(),
        sum.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
    )
    return out


def _checked(rows: Tensor) -> Tensor:
    """The rows, contiguous."""
    if rows.dtype != torch.float32 or rows.dim() != 2 or rows.device.type != "cpu" or rows.shape[1] == 0:
        raise ValueError(
            f"rows must be float32 (n, W) on CPU with W > 0, got {rows.dtype} {tuple(rows.shape)} on {rows.device}"
        )
    if rows.requires_grad and torch.is_grad_enabled():
        raise ValueError("rounding has no gradient: call it under torch.no_grad()")
    return rows.contiguous()


def check_layer(layer: Int8Layer, outputs: int, width: int) -> None:
    check_tensor("weight", layer.weight, torch.int8, (outputs, width))
    for name in ("scale", "sum", "bias"):
        check_tensor(name, getattr(layer, name), torch.float32, (outputs,))


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be {dtype} {shape} on CPU and contiguous, got {tensor.dtype} {tuple(tensor.shape)} with "
            f"strides {tensor.stride()} on {tensor.device}"
        )
