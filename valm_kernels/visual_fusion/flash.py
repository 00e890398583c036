"""PyTorch's flash attention on CUDA for the text of a long call, whose images one kernel of ours then joins to it.

The images of a query take registers that a tile of text products could use, so for long texts two passes take less time
than one. From which length on is an estimate from the compiler's figures, and not measured yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from valm_kernels.visual_fusion.inputs import Inputs

_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
# Under Triton's interpreter, whose tensors are the CPU's.
_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Keys times head dimension: 2,048 keys of 128 numbers, or 4,096 of 64.
LONG = 2048 * 128
NAME = "flash+triton"


def is_long(inputs: Inputs) -> bool:
    """Whether impl="auto" takes flash attention for the text of these inputs on CUDA."""
    k = inputs.k
    return k.shape[2] * k.shape[3] >= LONG and refusal(inputs) is None


def refusal(inputs: Inputs) -> str | None:
    """What of these inputs flash attention cannot do; None if there is nothing."""
    q, k = inputs.q, inputs.k
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"does not take {str(q.dtype).removeprefix('torch.')}, only float16 and bfloat16"
    if q.shape[3] % 8:
        return f"needs a head dimension that is a multiple of 8, not {q.shape[3]}"
    if inputs.first_key is not None or inputs.cache_seqlens is not None or inputs.softcap is not None:
        return "does not take first_key, cu_seqlens, cache_seqlens or softcap"
    if inputs.causal and q.shape[2] != k.shape[2]:
        return f"needs as many queries as keys with causal=True, not {q.shape[2]} and {k.shape[2]}"
    return None


def text_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Tq, D) and lse (B, Hq, Tq) float32 of attention to the text alone."""
    q, k, v = inputs[:3]
    if q.device.type == "cpu":
        out, lse = _cpu_flash(q, k, v, 0.0, inputs.causal, scale=inputs.scale)
    else:
        out, lse, *_ = _flash(q, k, v, 0.0, inputs.causal, False, scale=inputs.scale)
    return out, lse.contiguous()


def text_backward(grad_out: Tensor, out: Tensor, lse: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The text's part of the gradients of q, k and v, for the out and lse of text and images together.

    With these, flash attention's backward weighs each key with exp(score - lse) and subtracts sum(grad_out * out), as
    the joint softmax does.
    """
    q, k, v = inputs[:3]
    arguments = (grad_out, q, k, v, out, lse)
    if q.device.type == "cpu":
        return _cpu_flash_backward(*arguments, 0.0, inputs.causal, scale=inputs.scale)
    no_seed = lse.new_empty(2, dtype=torch.int64)  # there is no dropout
    lengths = (None, None, q.shape[2], k.shape[2])
    return _flash_backward(*arguments, *lengths, 0.0, inputs.causal, no_seed, no_seed[0], scale=inputs.scale)
