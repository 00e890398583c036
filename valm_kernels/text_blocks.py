"""Reads the next tokens of texts through a text tower's blocks, in float32 or int8, in one native CPU call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .int8_rows import Int8Layer, check_layer, check_tensor
from .native import cpu_isa, native, survives_fork


class FloatLayer(NamedTuple):
    """A linear layer: weight (N, W) and bias (N,) float32."""

    weight: Tensor
    bias: Tensor


class TextBlock(NamedTuple):
    """A pre-LN block of width W: x += attention_out(attention(attention_in(attention_norm(x)))), and then
    x += mlp_out(gelu(mlp_in(mlp_norm(x)))).

    attention_in has 3 W outputs: queries, keys and values. The norms have weight and bias, float32.
    """

    attention_norm: torch.nn.LayerNorm
    attention_in: FloatLayer | Int8Layer
    attention_out: FloatLayer | Int8Layer
    mlp_norm: torch.nn.LayerNorm
    mlp_in: FloatLayer | Int8Layer
    mlp_out: FloatLayer | Int8Layer


class TextBlocks:
    """The blocks of a text tower, all of one size. They read the weights in place, so a changed weight takes effect.
    There is no gradient.

    Args:
        heads: H, the number of heads of queries, keys and values.
        quick_gelu: the activation is x sigmoid(1.702 x) instead of x Phi(x).

    Raises:
        ValueError: a weight has another dtype or shape, is not contiguous or is not on CPU.
    """

    def __init__(self, blocks: Sequence[TextBlock], heads: int, quick_gelu: bool):
        self.blocks, self.heads, self.quick_gelu = blocks, heads, quick_gelu
        self.width, self.inner_width = blocks[0].mlp_in.weight.shape[1], blocks[0].mlp_in.weight.shape[0]
        if self.width % heads:
            raise ValueError(f"the width {self.width} is not a multiple of {heads} heads")
        self._eps = [(block.attention_norm.eps, block.mlp_norm.eps) for block in blocks]
        self._checked: list[list[int]] = []
        self._addresses()

    def _addresses(self) -> list[list[int]]:
        """For each block, the addresses of its norms and then four for each layer. Checks weights that have moved."""
        weights = map(_weights, self.blocks)
        addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in block] for block in weights]
        if addresses != self._checked:
            for block in self.blocks:
                self._check(block)
            self._checked = addresses
        return addresses

    def _check(self, block: TextBlock) -> None:
        width, inner = self.width, self.inner_width
        for norm in (block.attention_norm, block.mlp_norm):
            for tensor in (norm.weight, norm.bias):
                check_tensor("weight and bias of a norm", tensor, torch.float32, (width,))
        outputs, inputs = (3 * width, width, inner, width), (width, width, width, inner)
        for layer, *shape in zip(_layers(block), outputs, inputs, strict=True):
            if isinstance(layer, Int8Layer):
                check_layer(layer, *shape)
            else:
                check_tensor("weight", layer.weight, torch.float32, tuple(shape))
                check_tensor("bias", layer.bias, torch.float32, tuple(shape[:1]))

    @survives_fork
    def step(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        past: Tensor,
        *,
        eot_after: Sequence[int] = (),
        first_key: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Reads the next tokens of N texts and, in a second stream, an EOT after some of the tokens.

        A token sees itself and the tokens of its text before it. An EOT sees itself and what its token sees. Results
        equal PyTorch's operations (for int8 layers, `linear_rows`) up to rounding.

        Args:
            hidden: (T + A, W) float32, contiguous: the T tokens, text after text, and then the A EOTs. Changed in
                place.
            lengths: the number of new tokens of each text, at least 1.
            past: (blocks, 2, N, H, P, W / H) float32, keys and values of the tokens before, each head's numbers
                contiguous.
            eot_after: for each EOT the number of its token, from 0 to T - 1.
            first_key: for each text the first of the P keys that it sees; by default every text sees all keys.

        Returns:
            The last block's output, (A, W) for the EOTs, or (T, W) if there are none; and the queries, keys and values
            in every block, (blocks, T + A, 3 W) float32.

        Raises:
            ValueError: a tensor has another dtype, shape or layout, is not on CPU or needs a gradient, or the other
                arguments do not fit.
        """
        texts, count = past.shape[2], sum(lengths)
        if len(lengths) != texts or len(first_key) not in (0, texts) or min(lengths, default=1) < 1:
            raise ValueError(
                f"lengths, and first_key if given, must have one number for each of the {texts} texts in past, and "
                f"lengths must be positive, got {lengths} and {first_key}"
            )
        if not all(0 <= token < count for token in eot_after):
            raise ValueError(f"eot_after must be from 0 to {count - 1}, got {eot_after}")
        check_tensor("hidden", hidden, torch.float32, (count + len(eot_after), self.width))
        shape = (len(self.blocks), 2, texts, self.heads, past.shape[4], self.width // self.heads)
        if past.dtype != torch.float32 or past.shape != shape or past.device.type != "cpu" or past.stride(5) != 1:
            raise ValueError(
                f"past must be float32 {shape} on CPU with contiguous rows, got {past.dtype} {tuple(past.shape)} with "
                f"strides {past.stride()} on {past.device}"
            )
        if torch.is_grad_enabled() and (hidden.requires_grad or past.requires_grad):
            raise ValueError("a step has no gradient: call it under torch.no_grad()")
        projected = hidden.new_empty(len(self.blocks), len(hidden), 3 * self.width)
        native().text_blocks_step(
            cpu_isa(),
            torch.get_num_threads(),
            self.width,
            self.inner_width,
            self.heads,
            self.quick_gelu,
            self._addresses(),
            self._eps,
            past.data_ptr(),
            past.stride()[:5],
            past.shape[4],
            first_key,
            lengths,
            eot_after,
            hidden.data_ptr(),
            projected.data_ptr(),
        )
        return hidden[count:] if eot_after else hidden, projected


def _layers(block: TextBlock) -> tuple[FloatLayer | Int8Layer, ...]:
    return block.attention_in, block.attention_out, block.mlp_in, block.mlp_out


def _weights(block: TextBlock) -> list[Tensor | None]:
    """Weight and bias of each norm, then weight, scale, sum and bias of each layer."""
    weights: list[Tensor | None] = []
    for norm in (block.attention_norm, block.mlp_norm):
        weights += (norm.weight, norm.bias)
    for layer in _layers(block):
        weights += layer if isinstance(layer, Int8Layer) else (layer.weight, None, None, layer.bias)
    return weights
