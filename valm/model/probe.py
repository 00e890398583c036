"""Finds where a decoder can see images: its layers, a layer's attention, and the attention's input and arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from valm.errors import ValmError
from valm.model.attention import IMPLEMENTATION, visible_keys
from valm.model.positions import AttentionCall, alone, named_arguments, positions
from valm.model.private_names import uses_interface, with_attention

# Tokens of the probe's text. In some models the first token is an outlier, so the scale of a hidden state is a median
# over several tokens.
PROBE_TOKENS = 8


class Probe(NamedTuple):
    """Properties of a layer's attention.

    Attributes:
        layer: index of the layer, negative from the end.
        width: C, dimension of the attention's input.
        heads, kv_heads, key_dim, value_dim: Hq, Hkv, Dk, Dv.
        norm_weight, norm_bias: (C,), of the norm before the attention. Without a norm, the scale of its input, and 0.
        calls: of the attention, at the first positions and at the last positions.
        layer_drops_images: the layer does not pass images on to its attention.
    """

    layer: int
    width: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    norm_weight: Tensor
    norm_bias: Tensor
    calls: list[AttentionCall]
    layer_drops_images: bool


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the decoder, without the layers of a vision tower. Raises ValmError if there are none."""
    if model.config.is_encoder_decoder:
        raise ValmError(f"{type(model).__name__} has an encoder: only decoders can be augmented")
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    # the decoder first, without a vision tower; ModernBERT-Decoder's get_decoder() returns its head, hence the rest
    modules = (*model.get_decoder().modules(), *model.modules())
    lists = [module for module in modules if isinstance(module, nn.ModuleList)]
    of_length = [module for module in lists if len(module) == count]
    # LongCat counts a layer twice, because it contains two attentions
    found = of_length or [module for module in lists if any(_interface_paths(layer) for layer in module)]
    if not found:
        raise ValmError(f"{type(model).__name__} has no list of its {count} layers")
    return found[0]


def attention_path(model: PreTrainedModel, layer: int) -> str:
    """The path of a layer's attention inside the layer. Raises ValmError if there is no such layer, or it contains none
    or several attentions that use transformers' attention interface. The message names the layers with one."""
    layers = decoder_layers(model)
    if not -len(layers) <= layer < len(layers):
        raise ValmError(f"layer must be one of the {len(layers)} layers of {type(model).__name__}, got {layer}")
    paths = _interface_paths(layers[layer])
    if len(paths) == 1:
        return paths[0]
    how_many = "no attention" if not paths else f"{len(paths)} attentions"
    others = [number for number, other in enumerate(layers) if len(_interface_paths(other)) == 1]
    remedy = f"; layers with one attention: {', '.join(map(str, others))}" if others else ""
    raise ValmError(
        f"layer {layer} of {type(model).__name__} has {how_many} on transformers' attention interface{remedy}"
    )


@dataclass
class _Run:
    """What a run of the model showed about a layer with one attention.

    arguments: of the attention's last call. images: whether they contained an image_pool. reached: whether the layer
    got an image_pool. outputs: of the layer's children.
    """

    attention: nn.Module
    arguments: dict[str, Any] | None = None
    images: bool = False
    reached: bool = False
    outputs: list[tuple[nn.Module, Any]] = field(default_factory=list)


def probe(model: PreTrainedModel, layer: int | None = None) -> Probe:
    """Runs the model on a few tokens with images, which nothing sees yet, and reads the arguments of an attention.

    If the model's forward takes no position_ids, or its config does not give the number of positions, it runs at the
    first positions only.

    Args:
        layer: None is -2; if the attention of layer -2 computes no keys of its own, the last layer that does. In some
            families, such as Gemma 4, the last layers attend to the keys of an earlier layer.

    Raises:
        ValmError: no layer can see images, or this layer cannot; the message says why.
    """
    layers = decoder_layers(model)
    if layer is not None:
        attention_path(model, layer)  # raises unless there is exactly one
    runs = _record(model)
    name, count = type(model).__name__, len(layers)
    serving = partial(_layers_with_keys, runs)
    if layer is None:
        found = serving([count - 2]) or serving()[-1:]
        layer = found[0] - count if found else -2
        attention_path(model, layer)
    run = runs[layer % count]
    if run.arguments is None:
        raise ValmError(f"{name} does not run layer {layer} in every pass, so it cannot see images")
    if not run.reached:
        raise ValmError(f"{name} does not pass images on to its layers")
    if "hidden_states" not in run.arguments:
        raise ValmError(f"{type(run.attention).__name__} has no hidden_states among its arguments")
    sizes = _attend(run.attention, run.arguments)
    attention = type(run.attention).__name__
    if not sizes.causal:
        raise ValmError(f"{attention} is not causal: only decoders can be augmented")
    if sizes.sparse:
        raise ValmError(
            f"{attention} selects the tokens that each token attends to (sparse attention), and has no such selection "
            "of images"
        )
    mask = run.arguments.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise ValmError(f"{attention} reads an attention mask of type {type(mask).__name__}, expected a tensor")
    if not _has_keys(run.attention, run.arguments):
        others = serving()
        remedy = f"; layers that compute their own: {', '.join(map(str, others))}" if others else ""
        raise ValmError(
            f"layer {layer} of {name} takes its keys and values from another layer, so it can compute none for "
            f"images{remedy}"
        )
    hidden_states = run.arguments["hidden_states"]
    norm = next((module for module, output in run.outputs if output is hidden_states), None)
    with torch.no_grad(), in_mode(model, training=False):
        weight, bias = _affine(norm, hidden_states)
    tokens = hidden_states.shape[1]
    calls = [AttentionCall(run.arguments, tokens - 1)]
    # near and far positions, since an attention may depend on positions only from some position on
    last = positions(model) or 0
    if last > tokens and "position_ids" in inspect.signature(model.forward).parameters:
        far = _record(model, position_ids=torch.arange(last - tokens, last, device=model.device)[None])
        calls.append(AttentionCall(far[layer % count].arguments or {}, last - 1))
    return Probe(
        layer,
        hidden_states.shape[-1],
        sizes.query[1],
        sizes.key[1],
        sizes.key[-1],
        sizes.value[-1],
        weight,
        bias,
        calls,
        layer_drops_images=not run.images,
    )


def _record(model: PreTrainedModel, **inputs: Any) -> dict[int, _Run]:
    """Runs the model on a few tokens and records each layer with one attention. Raises ValmError if the model's layers
    take no images."""
    runs = {
        number: _Run(layer.get_submodule(paths[0]))
        for number, layer in enumerate(decoder_layers(model))
        if len(paths := _interface_paths(layer)) == 1
    }

    def at_layer(run: _Run, module: nn.Module, args: tuple, kwargs: dict) -> None:
        run.reached, run.outputs = "image_pool" in kwargs, []

    def at_child(run: _Run, module: nn.Module, args: tuple, output: Any) -> None:
        run.outputs.append((module, output))

    def at_attention(run: _Run, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        arguments = named_arguments(_forward_names(module), args, kwargs)
        run.images = arguments.pop("image_pool", None) is not None
        arguments.pop("image_index", None)
        run.arguments = arguments
        return (), arguments

    tokens = probe_tokens(model)
    images = {"image_pool": torch.zeros(1, 1, device=model.device), "image_index": torch.zeros_like(tokens)[..., None]}
    layers, hooks = decoder_layers(model), []
    for number, run in runs.items():
        hooks.append(layers[number].register_forward_pre_hook(partial(at_layer, run), with_kwargs=True))
        hooks.append(run.attention.register_forward_pre_hook(partial(at_attention, run), with_kwargs=True))
        hooks += [child.register_forward_hook(partial(at_child, run)) for child in layers[number].children()]
    try:
        with torch.no_grad(), in_mode(model, training=False):
            model(tokens, use_cache=False, **images, **inputs)
    except TypeError as error:
        raise ValmError(f"{type(model).__name__} cannot pass images on to its layers: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return runs


def _layers_with_keys(runs: dict[int, _Run], among: list[int] | None = None) -> list[int]:
    """The numbers of the layers whose attention computes keys and values from its input; among=None checks all."""
    found = []
    for number, run in runs.items():
        if run.arguments is not None and (among is None or number in among):
            with suppress(ValmError):
                if _has_keys(run.attention, run.arguments):
                    found.append(number)
    return found


def _has_keys(attention: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether the attention computes keys from its input: calls it with `arguments` and one token less. Raises
    ValmError if the attention does not run on other tokens."""
    try:
        fewer = arguments["hidden_states"][:, :-1]
        return _attend(attention, alone(fewer, arguments)).key[2] == fewer.shape[1]
    except Exception as error:  # of the family's own code
        raise not_on_images(attention, error) from error


def not_on_images(attention: nn.Module, error: Exception) -> ValmError:
    """The error to raise after the family's code raised `error` while its attention ran on images."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return ValmError(f"{type(attention).__name__} does not run on images, without the text's mask: {reason}")


def probe_tokens(model: Any) -> Tensor:
    """Token ids (1, T) that the model can read, T = PROBE_TOKENS or all its positions if they are fewer. Raises
    ValmError if the model reads only one token."""
    count = min(PROBE_TOKENS, positions(model) or PROBE_TOKENS)
    if count < 2:
        raise ValmError(f"{type(model).__name__} reads texts of {count} token: it must read at least 2")
    return torch.arange(count, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size


@torch.no_grad()
def keeps_apart(model: Any, forward: Callable[..., Any]) -> bool:
    """Whether two documents in a row, whose positions restart, do not see each other.

    Some families ignore positions when they tell documents apart, such as recurrent ones, whose state continues.

    Args:
        forward: of `model` or of its decoder; its first result is compared.
    """
    if "position_ids" not in inspect.signature(forward).parameters:
        return False
    ids = probe_tokens(model)
    half = ids.shape[1] // 2
    parts = ids[:, :half], ids[:, half:]
    restarting = torch.cat([torch.arange(part.shape[1], device=ids.device) for part in parts])[None]
    other = ids.clone()
    other[:, :half] = (ids[:, :half] + 1) % model.config.get_text_config(decoder=True).vocab_size

    def outputs(tokens: Tensor, **arguments: Any) -> Tensor:
        return forward(input_ids=tokens, use_cache=False, **arguments)[0]

    with in_mode(model, training=False):
        try:
            packed, changed = outputs(ids, position_ids=restarting), outputs(other, position_ids=restarting)
            single = torch.cat([outputs(part) for part in parts], 1)
        except (TypeError, ValueError, RuntimeError):  # of the family's own code
            return False
    largest, eps = packed.abs().max().item(), torch.finfo(packed.dtype).eps
    # The second document's output must not depend on the first. In 16 bits a dependence may be as small as the rounding
    # error, so there the outputs must agree to the bit.
    moved = (packed - changed)[:, half:].abs().max().item()
    if moved > (8 * eps * largest if packed.dtype.itemsize >= 4 else 0):
        return False
    # Rows of different lengths round differently; a family in float64 may compute norms or a softmax in float32.
    return (packed - single).abs().max().item() <= max(eps, torch.finfo(torch.float32).eps) ** 0.5 * largest


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or eval mode; each module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    for module, _ in modes:
        if type(module).__name__ == "Linear4bit":  # in eval mode bitsandbytes packs it for a CPU, without gradients
            module.training = True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _forward_names(attention: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(attention).forward).parameters)[1:]


def _affine(norm: nn.Module | None, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias (C,) of a norm, whatever their names and form.

    Without weight and bias, every norm maps a row of mean 0 and RMS 1 to itself.
    """
    if norm is None:  # the attention reads the residual stream
        scale = hidden_states.float().square().mean(-1).sqrt().median()
        return scale.expand(hidden_states.shape[-1]), torch.zeros_like(scale).expand(hidden_states.shape[-1])
    signs = torch.ones_like(hidden_states[:1, :1])
    signs[..., 1::2] = -1
    plus, minus = norm(signs)[0, 0], norm(-signs)[0, 0]
    return (plus - minus) / 2 * signs[0, 0], (plus + minus) / 2


class _Sizes(Exception):
    """Ends an attention's call where it would call its implementation, and holds the shapes of its arguments."""

    def __init__(self, query: torch.Size, key: torch.Size, value: torch.Size, causal: bool, sparse: bool):
        self.query, self.key, self.value, self.causal, self.sparse = query, key, value, causal, sparse


@torch.no_grad()
def _attend(attention: Any, arguments: dict[str, Any]) -> _Sizes:
    """The sizes in a call of the attention. Raises ValmError if the attention did not call transformers' attention
    interface."""
    config = attention.config
    attention.config = with_attention(config, IMPLEMENTATION)
    try:
        with in_mode(attention, training=False):
            attention.forward(**arguments, own=_end_with_sizes)
    except _Sizes as sizes:
        return sizes
    finally:
        attention.config = config
    raise ValmError(f"{type(attention).__name__} did not call transformers' attention interface")


def _end_with_sizes(
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
    raise _Sizes(query.shape, key.shape, value.shape, bool(causal), sparse)


def _interface_paths(layer: nn.Module) -> list[str]:
    """The paths of a layer's attentions, without cross-attentions."""
    found = {
        name: module
        for name, module in layer.named_modules()
        if uses_interface(type(module))
        and not any(word in name.lower() for word in ("cross", "encoder"))
        and "cross" not in type(module).__name__.lower()
    }
    causal = [name for name, module in found.items() if getattr(module, "is_causal", True)]
    return causal or list(found)
