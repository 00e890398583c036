"""A linear layer in int8, for a frozen text tower on a processor that multiplies int8 faster than float32."""

from __future__ import annotations

import torch
from torch import Tensor

from valm.errors import ValmError
from valm_kernels.int8_rows import round_rows, scale_products_


class Int8Linear(torch.nn.Module):
    """x @ weight.T + bias, with weights rounded to int8 per output channel and x per row, summed exactly in int32.

    A row's result does not depend on the others in a batch. A row of x is rounded to 256 steps from its least to its
    largest value: after a GELU, half of the steps from -max to max would be wasted.

    Args:
        weight: (N, W).
        bias: (N,).
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        weight = weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        self.weight = rounded.T.contiguous()  # (W, N)
        self.scale = scale  # (N,)
        self.sum = rounded.sum(1) * scale  # (N,), of each output channel's weights
        self.bias = bias.detach().float()

    def forward(self, states: Tensor) -> Tensor:
        """float32 states (..., W) to (..., N)."""
        rounded, step, zero = round_rows(states.flatten(0, -2))
        products = torch._int_mm(rounded, self.weight)
        out = scale_products_(products, step, zero, self.scale, self.sum, self.bias)
        return out.unflatten(0, states.shape[:-1])


def check_int8(device: torch.device) -> None:
    """
    Raises:
        ValmError: products of int8 are not faster than those of float32 on `device`.
    """
    if device.type != "cpu":
        raise ValmError(f"the text tower cannot be int8 on {device}: use bfloat16 there")
    if not torch.cpu._is_vnni_supported():
        raise ValmError(
            "the text tower cannot be int8: this processor has no AVX-512 VNNI, and PyTorch's int8 products would be "
            "many times slower than float32"
        )
