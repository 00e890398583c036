"""Finds where a decoder can see images: its layers, a layer's attention, and the input and arguments of that."""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from valm.augmented.attention import VisualAttention
from valm.errors import ValmError

PROBE_IMPLEMENTATION = "valm_probe"
# Tokens of the probe's text. In some models the first token is an outlier, so the scale of a hidden state is the median
# over several.
PROBE_TOKENS = 8


class Probe(NamedTuple):
    """Properties of a layer's attention.

    Attributes:
        width: C, dimension of its input.
        heads, kv_heads, key_dim, value_dim: Hq, Hkv, Dk, Dv.
        norm_weight, norm_bias: (C,), of the norm before it; without one, the scale of its input, and 0.
        call: the arguments that it was called with.
    """

    width: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    norm_weight: Tensor
    norm_bias: Tensor
    call: tuple[tuple, dict[str, Any]]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the decoder.

    Raises:
        ValmError: there are none.
    """
    if model.config.is_encoder_decoder:
        raise ValmError(f"{type(model).__name__} has an encoder: only decoders can be augmented")
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise ValmError(f"{type(model).__name__} has no list of its {count} layers")
    return lists[0]


def attention_path(model: PreTrainedModel, layer: int) -> str:
    """The path of a layer's attention inside the layer.

    Raises:
        ValmError: there is no such layer, or it has no attention that uses transformers' attention interface, or
            several; the message names the layers that have one.
    """
    layers = decoder_layers(model)
    if not -len(layers) <= layer < len(layers):
        raise ValmError(f"layer must be one of the {len(layers)} layers of {type(model).__name__}, got {layer}")
    paths = _interface_paths(layers[layer])
    if len(paths) == 1:
        return paths[0]
    others = [number for number, other in enumerate(layers) if len(_interface_paths(other)) == 1]
    how_many = "no attention" if not paths else f"{len(paths)} attentions"
    remedy = f"; those that have one: {', '.join(map(str, others))}" if others else ""
    raise ValmError(
        f"layer {layer} of {type(model).__name__} has {how_many} on transformers' attention interface{remedy}"
    )


def probe(model: PreTrainedModel, layer: nn.Module, path: str) -> Probe:
    """Runs the model on a few tokens up to the attention at `path` of `layer` and reads its arguments.

    Raises:
        ValmError: the images do not reach the layer, the attention is not causal or was not called.
    """
    attention: Any = layer.get_submodule(path)
    outputs: list[tuple[nn.Module, Any]] = []
    read: dict[str, Any] = {}

    def at_layer(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        read["reached"] = kwargs.pop("image_pool", None) is not None
        kwargs.pop("image_index", None)
        return args, kwargs

    def at_attention(module: nn.Module, args: tuple, kwargs: dict) -> None:
        read["call"] = args, kwargs

    hooks = [
        layer.register_forward_pre_hook(at_layer, with_kwargs=True),
        attention.register_forward_pre_hook(at_attention, with_kwargs=True),
        *(
            child.register_forward_hook(lambda module, args, output: outputs.append((module, output)))
            for child in layer.children()
        ),
    ]
    config, attention.config = attention.config, copy.copy(attention.config)
    attention.config._attn_implementation_internal = PROBE_IMPLEMENTATION
    tokens = torch.arange(PROBE_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    images = {"image_pool": torch.zeros(1, 1, device=model.device), "image_index": torch.zeros_like(tokens)[..., None]}
    found = None
    try:
        with torch.no_grad():
            model(tokens, use_cache=False, **images)
    except _Probed as probed:
        found = probed
    except TypeError as error:
        raise ValmError(f"{type(model).__name__} cannot pass images on to its layers: {error}") from error
    finally:
        attention.config = config
        for hook in hooks:
            hook.remove()
    if not read.get("reached"):
        raise ValmError(f"{type(model).__name__} does not pass images on to its layers")
    if found is None:
        raise ValmError(f"{type(attention).__name__} did not call transformers' attention interface")
    if not found.causal:
        raise ValmError(f"{type(attention).__name__} is not causal: only decoders can be augmented")
    args, kwargs = read["call"]
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    norm = next((module for module, output in outputs if output is hidden_states), None)
    weight, bias = _affine(norm, hidden_states)
    return Probe(
        hidden_states.shape[-1],
        found.query[1],
        found.key[1],
        found.key[-1],
        found.value[-1],
        weight,
        bias,
        read["call"],
    )


def _affine(norm: nn.Module | None, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias (C,) of a norm, under any names and in any form.

    Every norm maps a row of mean 0 and RMS 1 to itself, except for weight and bias.
    """
    if norm is None:  # the attention reads the residual stream
        scale = hidden_states.float().square().mean(-1).sqrt().median()
        return scale.expand(hidden_states.shape[-1]), torch.zeros_like(scale).expand(hidden_states.shape[-1])
    signs = torch.ones_like(hidden_states[:1, :1])
    signs[..., 1::2] = -1
    with torch.no_grad():
        plus, minus = norm(signs)[0, 0], norm(-signs)[0, 0]
    return (plus - minus) / 2 * signs[0, 0], (plus + minus) / 2


class _Probed(Exception):
    def __init__(self, query: torch.Size, key: torch.Size, value: torch.Size, causal: bool):
        self.query, self.key, self.value, self.causal = query, key, value, causal


def _probe_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    causal = kwargs.get("is_causal")
    raise _Probed(query.shape, key.shape, value.shape, getattr(module, "is_causal", True) if causal is None else causal)


AttentionInterface.register(PROBE_IMPLEMENTATION, _probe_attention)


def _interface_paths(layer: nn.Module) -> list[str]:
    return [
        name
        for name, module in layer.named_modules()
        if _uses_interface(type(module))
        and "cross" not in name.lower()
        and "cross" not in type(module).__name__.lower()
    ]


def _uses_interface(cls: type) -> bool:
    """Whether the forward of an attention class, or that behind the mixin, calls transformers' attention interface."""
    owner = next((base for base in cls.__mro__ if "forward" in vars(base) and base is not VisualAttention), None)
    code = getattr(inspect.unwrap(vars(owner)["forward"]), "__code__", None) if owner is not None else None
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
