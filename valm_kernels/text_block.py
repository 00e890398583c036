"""The next token of each text in a block of a text tower with int8 linear layers: on CPU, in one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .int8_rows import Int8Layer, check_layer, check_tensor
from .native import cpu_isa, native, survives_fork


class Int8TextBlock:
    """A pre-LN block of width W: x += out(attention(in(norm(x)))), and then x += out(gelu(in(norm(x)))).

    Args:
        heads: H, of queries, keys and values alike.
        norms: before the attention and before the MLP, with float32 weight and bias, which are copied.
        layers: in (3 W outputs: queries, keys, values) and out of the attention, in (M outputs) and out of the MLP.
        quick_gelu: the activation is x sigmoid(1.702 x), and not x Phi(x).

    Raises:
        ValueError: a weight is of another dtype or shape, not contiguous or not on CPU.
    """

    def __init__(self, heads: int, norms: Sequence[torch.nn.LayerNorm], layers: Sequence[Int8Layer], quick_gelu: bool):
        self.heads, self.quick_gelu = heads, quick_gelu
        self.width, self.inner_width = layers[0].weight.shape[1], layers[2].weight.shape[0]
        self.eps = [norm.eps for norm in norms]
        self.weights = [weight.detach().clone() for norm in norms for weight in (norm.weight, norm.bias)]
        for weight in self.weights:
            check_tensor("weight and bias of a norm", weight, torch.float32, (self.width,))
        inputs = (self.width, self.width, self.width, self.inner_width)
        outputs = (3 * self.width, self.width, self.inner_width, self.width)
        for layer, *shape in zip(layers, outputs, inputs, strict=True):
            check_layer(layer, *shape)
            self.weights += layer
        if self.width % heads:
            raise ValueError(f"a width of {self.width} is not of {heads} heads")

    @survives_fork
    def step(
        self, hidden: Tensor, keys: Tensor, values: Tensor, *, first_key: Tensor | None = None, first_out: int = 0
    ) -> Tensor:
        """Reads the next token of each of N texts and, in a second stream, an EOT behind it.

        The token sees those before it and itself, the EOT these and itself. Equals the operations of PyTorch with
        `linear_rows`, up to rounding.

        Args:
            hidden: (S, N, W) float32 of S = 1 or 2 streams, contiguous; afterwards the output of the block.
            keys, values: (N, H, P, W / H) float32 of the tokens before, each head's numbers contiguous.
            first_key: (N, 1) int32, the first of the P keys that each text sees; by default all see all.
            first_out: 1 leaves the first stream as it is: it only gives keys and values.

        Returns:
            The queries, keys and values of what was read, (S, N, 3 W) float32.

        Raises:
            ValueError: a tensor is of another dtype, shape or layout or not on CPU, or has a gradient.
        """
        streams, texts = hidden.shape[:2]
        check_tensor("hidden", hidden, torch.float32, (streams, texts, self.width))
        if not 0 <= first_out < streams <= 2:
            raise ValueError(
                f"hidden must be of one or two streams and first_out one of them, got {streams}, {first_out}"
            )
        past = (texts, self.heads, keys.shape[2], self.width // self.heads)
        for name, tensor in (("keys", keys), ("values", values)):
            same = tensor.dtype == torch.float32 and tensor.shape == past and tensor.device.type == "cpu"
            if not same or tensor.stride(3) != 1:
                raise ValueError(
                    f"{name} must be float32 {past} on CPU with contiguous rows, got {tensor.dtype} "
                    f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
                )
        if first_key is not None:
            check_tensor("first_key", first_key, torch.int32, (texts, 1))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, keys, values)):
            raise ValueError("a step has no gradient: call it under torch.no_grad()")
        projected = hidden.new_empty(streams, texts, 3 * self.width)
        native().text_block_step(
            cpu_isa(),
            torch.get_num_threads(),
            self.width,
            self.inner_width,
            self.heads,
            self.quick_gelu,
            [weight.data_ptr() for weight in self.weights],
            self.eps,
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride()[:3],
            values.stride()[:3],
            keys.shape[2],
            0 if first_key is None else first_key.data_ptr(),
            hidden.data_ptr(),
            texts,
            streams,
            first_out,
            projected.data_ptr(),
        )
        return projected
