"""PyTorch's flash attention on CUDA for the text of a long call; one Triton kernel then joins the images.

The images of a query take registers that a tile of text products could use, so two passes take less time than one pass
for long texts (crossover.py).

`torch.nn.attention.activate_flash_attention_impl` replaces the operators used here: after "FA3" or "FA4" they run
FlashAttention-3 or -4. Otherwise cuDNN's attention takes the place of flash attention where gpu-check has measured that
it is right and faster.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from . import crossover
from .inputs import Inputs, num_images
from .layout import empty_rows_like, into

_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
# Flash attention for packed documents, with tokens before heads.
_packed_flash = torch.ops.aten._flash_attention_forward.default
_packed_flash_backward = torch.ops.aten._flash_attention_backward.default
_cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
# Used under Triton's interpreter, with CPU tensors.
_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Other implementations of these operators: the compute capabilities, rounded down, and the largest head dimension that
# they support.
SERVED = {"FA3": ((9,), 256), "FA4": ((9, 10), 128)}
# PyTorch's own has no backward for head dimensions from the first to the second on GPUs of these compute capabilities,
# whose blocks have 99 KiB of shared memory.
NO_BACKWARD, SMALL_BLOCKS = (193, 224), (86, 89, 120, 121)
# cuDNN's attention supports larger head dimensions only on some GPUs.
CUDNN_DIM = 128

NAME = "flash+triton"


def is_faster(inputs: Inputs) -> bool:
    """Whether impl="auto" chooses flash attention for the text of these inputs on CUDA."""
    if refusal(inputs) is not None:
        return False
    if num_images(inputs) == 0:
        return True
    if inputs.q.shape[2] == 1:  # "triton" spreads the keys and images over the GPU
        return False
    if uses_cudnn(inputs):
        return True
    batch, _, num_keys, head_dim = inputs.k.shape
    documents = batch if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
    by_pytorch = active_implementation() is None
    return crossover.is_long(batch * num_keys, documents, head_dim, inputs.k.device, by_pytorch)


def uses_cudnn(inputs: Inputs) -> bool:
    """Whether cuDNN's attention reads the text on CUDA: it supports the call, and was measured: right, and faster."""
    _, _, num_keys, head_dim = inputs.k.shape
    # with some versions of cuDNN, PyTorch raises for a single query
    supported = inputs.cu_seqlens is None and inputs.q.shape[2] > 1 and head_dim <= CUDNN_DIM
    if not supported or active_implementation() is not None:
        return False
    return crossover.is_long_for_cudnn(num_keys, head_dim, inputs.k.device)


def refusal(inputs: Inputs) -> str | None:
    """Why flash attention does not support these inputs; None if it does."""
    q, k = inputs.q, inputs.k
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"does not take {str(q.dtype).removeprefix('torch.')}, only float16 and bfloat16"
    if q.shape[3] % 8:
        return f"needs a head dimension that is a multiple of 8, not {q.shape[3]}"
    if inputs.cache_seqlens is not None or inputs.softcap is not None:
        return "does not take cache_seqlens or softcap"
    if inputs.first_key is not None and inputs.cu_seqlens is None:
        return "does not take first_key, only documents as cu_seqlens"
    if inputs.cu_seqlens is not None and q.shape[2] != k.shape[2]:
        return f"needs as many queries as keys with cu_seqlens, not {q.shape[2]} and {k.shape[2]}"
    if _is_causal(inputs) and q.shape[2] != k.shape[2]:
        return f"needs one query, or as many as keys, with causal=True, not {q.shape[2]} and {k.shape[2]}"
    active = active_implementation()
    if not serves(active, q.device, q.shape[3]):
        if active in SERVED:
            remedy = "call torch.nn.attention.restore_flash_attention_impl()"
            return f"is {active} now, which does not support head dimension {q.shape[3]} on {q.device}: {remedy}"
        return f"does not support head dimension {q.shape[3]} on {q.device}"
    return None


def _is_causal(inputs: Inputs) -> bool:
    """Whether some query does not see all keys. A single query is the last one and sees all."""
    return inputs.causal and inputs.q.shape[2] > 1


@torch.compiler.assume_constant_result
def active_implementation() -> str | None:
    """The name of the implementation that replaces PyTorch's own flash attention, or None."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)  # from PyTorch 2.11 on
    return None if current is None else current()


def serves(implementation: str | None, device: torch.device, head_dim: int) -> bool:
    """Whether an implementation of the operators, None for PyTorch's own, supports a device, with a backward."""
    capability = crossover.capability(device)
    if capability == 0:
        return True
    if implementation in SERVED:
        majors, most = SERVED[implementation]
        return capability // 10 in majors and head_dim <= most
    return not (NO_BACKWARD[0] <= head_dim <= NO_BACKWARD[1] and capability in SMALL_BLOCKS)


def text_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Tq, D) and lse (B, Hq, Tq) float32 of attention to only the text."""
    text = inputs[:3]
    options = (0.0, _is_causal(inputs))  # dropout probability 0
    if inputs.cu_seqlens is not None:
        rows = [_one_row(x) for x in text]
        if _on_cpu(inputs):
            out, lse = _of_each_document(_cpu_flash, rows, options, inputs)
        else:
            tokens_first = (x.transpose(0, 1) for x in rows)
            out, lse, *_ = _packed_flash(*tokens_first, *_bounds(inputs), *options, False, scale=inputs.scale)
            out = out.transpose(0, 1)
        out, lse = _rows(out, inputs), _rows(lse, inputs)
    elif _on_cpu(inputs):
        out, lse = _cpu_flash(*text, *options, scale=inputs.scale)
    elif uses_cudnn(inputs):
        out, lse, *_ = _cudnn(*text, None, True, *options, False, scale=inputs.scale)
        lse = lse.reshape(lse.shape[:3])  # (B, Hq, Tq, 1)
    else:
        out, lse, *_ = _flash(*text, *options, False, scale=inputs.scale)
    return out, lse.contiguous()


def text_backward(grad_out: Tensor, out: Tensor, lse: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """The text's part of the gradients of q, k and v, for the out and lse of text and images together.

    With these, flash attention's backward weighs each key by exp(score - lse) and subtracts sum(grad_out * out), like
    the joint softmax.
    """
    q, k, v = inputs[:3]
    tensors = (grad_out, q, k, v, out, lse)
    options: tuple[Any, ...] = (0.0, _is_causal(inputs))
    # the random state of dropout, which is not used
    random = (lse.new_empty(2, dtype=torch.int64), lse.new_empty((), dtype=torch.int64))
    if inputs.cu_seqlens is not None:
        rows = [_one_row(x) for x in tensors]
        if _on_cpu(inputs):
            gradients = _of_each_document(_cpu_flash_backward, rows, options, inputs)
        else:
            *tokens_first, lse_row = (*(x.transpose(0, 1) for x in rows[:-1]), rows[-1])
            options = (*_bounds(inputs), *options, *random)
            found = _packed_flash_backward(*tokens_first, lse_row, *options, scale=inputs.scale)
            gradients = tuple(gradient.transpose(0, 1) for gradient in found)
        return tuple(_rows(gradient, inputs) for gradient in gradients)
    if _on_cpu(inputs):
        return _cpu_flash_backward(*tensors, *options, scale=inputs.scale)
    lengths = (None, None, q.shape[2], k.shape[2])
    if uses_cudnn(inputs):
        # some versions of PyTorch cache this backward by the strides of q, k and v only: the others must follow from q
        grad_out, out = (into(empty_rows_like(q), x) for x in (grad_out, out))
        tensors = (grad_out, q, k, v, out, lse[..., None])
        return _cudnn_backward(*tensors, *random, None, *lengths, *options, scale=inputs.scale)
    return _flash_backward(*tensors, *lengths, *options, *random, scale=inputs.scale)


def _on_cpu(inputs: Inputs) -> bool:
    return inputs.q.device.type == "cpu"


def _bounds(inputs: Inputs) -> tuple[Any, ...]:
    """The document bounds of queries and keys, and an upper bound of the longest document."""
    assert inputs.cu_seqlens is not None
    bounds = inputs.cu_seqlens.int()
    # only the device knows the exact length
    longest = inputs.q.shape[2] if inputs.max_seqlen is None else min(inputs.max_seqlen, inputs.q.shape[2])
    return bounds, bounds, longest, longest


def _one_row(x: Tensor) -> Tensor:
    """(B, H, T, ...) as (H, B T, ...)."""
    return x.transpose(0, 1).flatten(1, 2)


def _rows(x: Tensor, inputs: Inputs) -> Tensor:
    """(H, B T, ...) as (B, H, T, ...)."""
    return x.unflatten(1, (inputs.q.shape[0], -1)).transpose(0, 1)


def _of_each_document(operator: Any, rows: list[Tensor], options: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """The results of a CPU operator for one document after the other, joined along the tokens."""
    assert inputs.cu_seqlens is not None
    documents = [slice(*bounds) for bounds in pairwise(inputs.cu_seqlens.tolist()) if bounds[0] < bounds[1]]
    parts = [operator(*(x[None, :, tokens] for x in rows), *options, scale=inputs.scale) for tokens in documents]
    return tuple(torch.cat(results, 2)[0] for results in zip(*parts, strict=True))
