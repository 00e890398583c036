"""Finds where a decoder can see images: its layers, a layer's attention, and the input and arguments of that."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from valm.errors import ValmError
from valm.model.attention import VisualAttention, visible_keys
from valm.model.positions import Call, alone, named_arguments, positions

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
        calls: of the attention, at the first positions and at the last ones.
    """

    width: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    norm_weight: Tensor
    norm_bias: Tensor
    calls: list[Call]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the decoder, without those of a vision tower beside it.

    Raises:
        ValmError: there are none.
    """
    if model.config.is_encoder_decoder:
        raise ValmError(f"{type(model).__name__} has an encoder: only decoders can be augmented")
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    # the decoder first, without a vision tower; get_decoder() of ModernBERT-Decoder is its head, which has that name
    modules = (*model.get_decoder().modules(), *model.modules())
    lists = [module for module in modules if isinstance(module, nn.ModuleList)]
    of_length = [module for module in lists if len(module) == count]
    # in LongCat a layer counts twice, as it has two attentions
    found = of_length or [module for module in lists if any(_interface_paths(layer) for layer in module)]
    if not found:
        raise ValmError(f"{type(model).__name__} has no list of its {count} layers")
    return found[0]


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


def default_layer(model: PreTrainedModel) -> int:
    """-2, the layer before the last; where that has no attention with keys of its own, the last layer that has one."""
    count = len(decoder_layers(model))
    if layers_with_keys(model, [count - 2]):
        return -2
    serving = layers_with_keys(model)
    return serving[-1] - count if serving else -2


def layers_with_keys(model: PreTrainedModel, among: Sequence[int] | None = None) -> list[int]:
    """The numbers of the layers that have one attention, which runs on images and makes keys and values of its input.

    In some families, such as Gemma 4, the last layers attend to the keys of a layer before them.

    among: the numbers that are looked at; None for all.
    """
    attentions = {
        number: layer.get_submodule(paths[0])
        for number, layer in enumerate(decoder_layers(model))
        if (among is None or number in among) and len(paths := _interface_paths(layer)) == 1
    }
    calls: dict[int, dict[str, Any]] = {}
    found = []

    def read(number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[number] = named_arguments(_forward_names(module), args, kwargs)

    hooks = [
        attention.register_forward_pre_hook(partial(read, number), with_kwargs=True)
        for number, attention in attentions.items()
    ]
    try:
        with torch.no_grad(), in_mode(model, training=False):
            model(probe_tokens(model), use_cache=False)
            for number in calls:
                with suppress(ValmError):
                    if _has_keys(attentions[number], calls[number]):
                        found.append(number)
        return found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _has_keys(attention: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether the attention makes keys of its input, by a call as that with `arguments` but of one token less.

    Raises:
        ValmError: it does not run on other tokens.
    """
    try:
        fewer = arguments["hidden_states"][:, :-1]
        with _probing(attention), in_mode(attention, training=False):
            attention(**alone(fewer, arguments))
    except _Probed as probed:
        return probed.key[2] == fewer.shape[1]
    except Exception as error:  # of the family's own code
        raise not_on_images(attention, error) from error
    return False


def not_on_images(attention: nn.Module, error: Exception) -> ValmError:
    """What to raise where the family's own code raised `error` when its attention ran on images."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return ValmError(f"{type(attention).__name__} does not run on images, without the text's mask: {reason}")


def probe(model: PreTrainedModel, layer: int) -> Probe:
    """Runs the model on a few tokens up to the attention of `layer` and reads its arguments.

    A model whose forward has no position_ids, or whose config does not say how many positions there are, runs at the
    first positions only.

    Raises:
        ValmError: the images do not reach the layer, the attention is not causal, is sparse, was not called, has a mask
            that cannot be read or takes its keys from another layer.
    """
    path = attention_path(model, layer)
    block = decoder_layers(model)[layer]
    attention: Any = block.get_submodule(path)
    outputs: list[tuple[nn.Module, Any]] = []
    read: dict[str, Any] = {}

    def at_layer(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        read["reached"] = kwargs.pop("image_pool", None) is not None
        kwargs.pop("image_index", None)
        return args, kwargs

    def at_attention(module: nn.Module, args: tuple, kwargs: dict) -> None:
        read["arguments"] = named_arguments(_forward_names(attention), args, kwargs)

    def run(**inputs: Any) -> _Probed | None:
        try:
            with _probing(attention):
                model(tokens, use_cache=False, **images, **inputs)
        except _Probed as probed:
            return probed
        except TypeError as error:
            raise ValmError(f"{type(model).__name__} cannot pass images on to its layers: {error}") from error
        return None

    tokens = probe_tokens(model)
    images = {"image_pool": torch.zeros(1, 1, device=model.device), "image_index": torch.zeros_like(tokens)[..., None]}
    hooks = [
        block.register_forward_pre_hook(at_layer, with_kwargs=True),
        attention.register_forward_pre_hook(at_attention, with_kwargs=True),
        *(
            child.register_forward_hook(lambda module, args, output: outputs.append((module, output)))
            for child in block.children()
        ),
    ]
    try:
        with torch.no_grad(), in_mode(model, training=False):
            found = run()
            if not read.get("reached"):
                raise ValmError(f"{type(model).__name__} does not pass images on to its layers")
            if found is None:
                raise ValmError(f"{type(attention).__name__} did not call transformers' attention interface")
            if not found.causal:
                raise ValmError(f"{type(attention).__name__} is not causal: only decoders can be augmented")
            if found.sparse:
                raise ValmError(
                    f"{type(attention).__name__} selects the tokens that each token attends to (sparse attention), and "
                    "has no such selection of images"
                )
            mask = read["arguments"].get("attention_mask")
            if mask is not None and not isinstance(mask, Tensor):
                kind = type(mask).__name__
                raise ValmError(f"{type(attention).__name__} reads an attention mask of type {kind}, expected a tensor")
            if "hidden_states" not in read["arguments"]:
                raise ValmError(f"{type(attention).__name__} has no hidden_states among its arguments")
            count = tokens.shape[1]
            calls = [Call(read["arguments"], count - 1)]
            hidden_states = calls[0].arguments["hidden_states"]
            norm = next((module for module, output in outputs if output is hidden_states), None)
            weight, bias = _affine(norm, hidden_states)
            # position by position, as what depends on them may do so only from some position on
            last = positions(model) or 0
            if last > count and "position_ids" in inspect.signature(model.forward).parameters:
                run(position_ids=torch.arange(last - count, last, device=model.device)[None])
                calls.append(Call(read["arguments"], last - 1))
    finally:
        for hook in hooks:
            hook.remove()
    if not _has_keys(attention, calls[0].arguments):
        others = layers_with_keys(model)
        remedy = f"; those that make their own: {', '.join(map(str, others))}" if others else ""
        raise ValmError(
            f"layer {layer} of {type(model).__name__} takes its keys and values from another layer, so it can make "
            f"none of images{remedy}"
        )
    return Probe(
        hidden_states.shape[-1], found.query[1], found.key[1], found.key[-1], found.value[-1], weight, bias, calls
    )


def probe_tokens(model: Any) -> Tensor:
    """Token ids (1, T) that the model can read, T = PROBE_TOKENS or all its positions if they are fewer.

    Raises:
        ValmError: it reads one token only.
    """
    count = min(PROBE_TOKENS, positions(model) or PROBE_TOKENS)
    if count < 2:
        raise ValmError(f"{type(model).__name__} reads texts of {count} token: it must read at least 2")
    return torch.arange(count, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or eval mode; each module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    for module, _ in modes:
        if type(module).__name__ == "Linear4bit":  # bitsandbytes would pack its weights for a CPU: without gradients
            module.training = True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _probing(attention: Any) -> Iterator[None]:
    """The attention raises _Probed where it would call its implementation."""
    config, attention.config = attention.config, copy.copy(attention.config)
    attention.config._attn_implementation_internal = PROBE_IMPLEMENTATION
    try:
        yield
    finally:
        attention.config = config


def _forward_names(attention: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(attention.forward).parameters)


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
    """Ends the run at the attention: its output is not known, and the layers behind it could not go on without it."""

    def __init__(self, query: torch.Size, key: torch.Size, value: torch.Size, causal: bool, sparse: bool):
        self.query, self.key, self.value, self.causal, self.sparse = query, key, value, causal, sparse


def _probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    seen = visible_keys(attention_mask)
    causal = kwargs.get("is_causal")
    if seen is not None:
        causal = not seen.triu(1).any()
    elif causal is None:
        causal = getattr(module, "is_causal", True)
    # DeepSeek's sparse attention: the keys that each query sees, for implementations other than "sdpa" and "eager"
    sparse = kwargs.get("indices") is not None
    raise _Probed(query.shape, key.shape, value.shape, bool(causal), sparse)


AttentionInterface.register(PROBE_IMPLEMENTATION, _probe_attention)


def _interface_paths(layer: nn.Module) -> list[str]:
    """The paths of a layer's attentions, without those over an encoder's states."""
    found = {
        name: module
        for name, module in layer.named_modules()
        if _uses_interface(type(module))
        and not any(word in name.lower() for word in ("cross", "encoder"))
        and "cross" not in type(module).__name__.lower()
    }
    causal = [name for name, module in found.items() if getattr(module, "is_causal", True)]
    return causal or list(found)


def _uses_interface(cls: type) -> bool:
    """Whether the forward of an attention class, or that behind the mixin, calls transformers' attention interface."""
    owner = next((base for base in cls.__mro__ if "forward" in vars(base) and base is not VisualAttention), None)
    code = getattr(inspect.unwrap(vars(owner)["forward"]), "__code__", None) if owner is not None else None
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
