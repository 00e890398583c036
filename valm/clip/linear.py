"""Linear layers of a text tower, or of a model that is not trained, with products that are fast on the processor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from valm.errors import ValmError
from valm_kernels.int8_rows import Int8Layer, has_avx2, has_vnni, linear_rows, round_rows, scale_products_
from valm_kernels.memory_maps import memory_limit

Linear = Callable[[Tensor], Tensor]
FEW_ROWS = 32  # one generated token for each text of a batch


def linear(weight: Tensor, bias: Tensor) -> Linear:
    """x @ weight.T + bias in the precision of weight (N, W) and bias (N,)."""
    return PackedLinear(weight, bias) if PackedLinear.can_pack(weight) else partial(F.linear, weight=weight, bias=bias)


class PackedLinear:
    """x @ weight.T + bias on a CPU. For few rows it multiplies a second copy of the weights, in oneDNN's own order.

    On two cores of Zen 4 with width 512, it takes a half to a quarter of F.linear's time for 2 rows, in float32 and
    bfloat16. For 928 rows it would be 1.1 to 1.4 times as fast, but oneDNN keeps half a megabyte for each number of
    rows that it has seen.

    Args:
        weight: (N, W), float32 or bfloat16.
        bias: (N,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self._pack()

    def _pack(self) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        self.version = self.weight._version

    @staticmethod
    def can_pack(weight: Tensor) -> bool:
        """Whether this PyTorch has these operators, which are not public, for this weight."""
        if type(weight) not in (Tensor, torch.nn.Parameter):  # for example a quantised weight
            return False
        if weight.is_inference():  # an inference tensor does not count its changes
            return False
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
            return False
        if weight.dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return weight.dtype == torch.float32

    def __call__(self, states: Tensor) -> Tensor:
        """States (..., W) to (..., N)."""
        if states.shape[:-1].numel() > FEW_ROWS:
            return F.linear(states, self.weight, self.bias)
        if self.version != self.weight._version:  # the weight was loaded or trained
            self._pack()
        bias = None if self.bias is None else self.bias.detach()
        return torch.ops.mkldnn._linear_pointwise(states, self.packed, bias, "none", [], "")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.weight, self.bias)  # packed weights cannot be pickled


def pack_layers(model: torch.nn.Module) -> None:
    """Makes the linear layers of a model multiply packed weights if `can_pack`, for models that are not trained.

    Packed weights are in memory twice, so a model that takes more than an eighth of the memory is not changed.
    """
    layers: list[Any] = [layer for layer in model.modules() if type(layer) in (torch.nn.Linear, Conv1D)]
    if sum(layer.weight.nbytes for layer in layers) > memory_limit() / 8:
        return
    for layer in layers:
        weight = layer.weight.T if type(layer) is Conv1D else layer.weight
        if PackedLinear.can_pack(weight) and "forward" not in vars(layer):  # not replaced by others or packed before
            layer.forward = PackedLinear(weight, layer.bias)


class Int8Linear:
    """x @ weight.T + bias, with weights rounded to int8 per output channel and x per row, summed exactly in int32.

    A row's result does not depend on other rows of the batch. A row of x is rounded to 256 steps from its least to its
    largest value: after a GELU, half of the steps from -max to max would be unused.

    Args:
        weight: (N, W).
        bias: (N,).
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        weight = weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        # the sum of each output channel's weights is (N,)
        self.layer = Int8Layer(rounded, scale, rounded.sum(1) * scale, bias.detach().float())

    def __call__(self, states: Tensor) -> Tensor:
        """float32 states (..., W) to (..., N)."""
        rows = states.flatten(0, -2)
        if len(rows) <= FEW_ROWS or not has_vnni():
            out = linear_rows(rows, *self.layer)
        else:
            rounded, step, zero = round_rows(rows)
            products = torch._int_mm(rounded, self.layer.weight.T)
            out = scale_products_(products, step, zero, *self.layer[1:])
        return out.unflatten(0, states.shape[:-1])


def check_int8(device: torch.device) -> None:
    """Raises ValmError unless int8 is faster than float32 on `device`."""
    if device.type != "cpu":
        raise ValmError(f"the text tower cannot be int8 on {device}: use bfloat16")
    if not has_avx2():
        raise ValmError(
            "the text tower cannot be int8: this processor has no AVX2, or VALM_KERNELS_ISA forbids it, so int8 would "
            "be slower than float32. Use float32"
        )
