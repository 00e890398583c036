"""Visual fusion inside any attention that uses transformers' attention interface.

Text and images share the attention's own W_k and W_v with their biases (Wang et al. 2022, equations 3-7)::

    image_k = W_k LN_img(z) + b^K_img      image_v = W_v LN_img(z) + b^V_img
    [a_i | b_i] = softmax([scale q_i k_j | scale q_i image_k_ik + logit_bias])
    out_i = sum_j a_ij v_j + sum_k b_ik image_v_ik

The images z of a batch come as a pool in which each image occurs once. They are projected once and gathered by index.
The attention weights get no dropout (published: 0.1).

To compute the images' keys and values, the attention runs on LN_img(z), and its call of the interface is intercepted.
So fused projections, norms of queries and keys, clipping, LoRA and latent attention need no code here. Text and images
then share one softmax (`visual_fusion_attn`).

Rotary positions: an image is at the position of the token that sees it, so its score uses the query before rotation.
Running the attention on the text with the identity rotation returns that query.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import threading
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import AttentionInterface
from transformers import initialization as init
from transformers.cache_utils import Cache

from valm.errors import ValmError
from valm.model.config import FusionOptions
from valm.model.positions import (
    CACHE_ARGUMENTS,
    AttentionCall,
    TokensBefore,
    alone,
    identity_rotation,
    named_arguments,
)
from valm.model.private_names import gone, own_attention
from valm.model.sketch import quantisation
from valm.model.subclasses import subclass
from valm_kernels import attention_weights, visual_fusion_attn

# A mixin's base class is known only when a model is augmented; type checkers see this placeholder.
_Module: Any = object

# Name of `fusion_attention` in transformers' attention interface.
IMPLEMENTATION = "valm"

# Head dimensions of `visual_fusion_attn`.
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256


# Arguments of a forward that only the fusion layer uses. The attentions of other layers ignore them.
IMAGE_ARGUMENTS = ("image_pool", "image_index")
FUSION_ARGUMENTS = (*IMAGE_ARGUMENTS, "text_limits", "read_weights")


class FusionTerms(NamedTuple):
    """hidden_states: (1, U, C), images in the form of the attention's input. k_bias: (Hkv, Dk). v_bias: (Hkv, Dv).
    logit_bias: (Hq,). The last three are float32 or float64."""

    hidden_states: Tensor
    k_bias: Tensor
    v_bias: Tensor
    logit_bias: Tensor


class Images(NamedTuple):
    """The images as `fusion_attention` takes them.

    Attributes:
        keys, values: (Hkv, U, Dk) and (Hkv, U, Dv).
        image_index: (B, T, K), -1 = no image.
        query: (B, Hq, T, Dk), for the image scores; None = the text's query.
        terms: the biases.
    """

    keys: Tensor
    values: Tensor
    image_index: Tensor
    query: Tensor | None
    terms: FusionTerms


class TextLimits(NamedTuple):
    """The part of the text that each query sees, as `visual_fusion_attn` takes it: first_key (B or 1, Tq) int32, None =
    from the first key; cache_seqlens (B or 1,) int32, None = all keys."""

    first_key: Tensor | None = None
    cache_seqlens: Tensor | None = None


class Scoring(NamedTuple):
    """What a family does to scores: it multiplies them by `scale`, caps them softly at `softcap`, adds `position_bias`
    to the scores of text, and gives each head `sink`, one more score without a value."""

    scale: float
    softcap: float | None = None
    position_bias: Tensor | None = None
    sink: Tensor | None = None


class ImageProjection(nn.Linear):
    """The input projection. Its initialisation leaves the global random generator unchanged, so with one seed a model
    and its text-only baseline get the same other weights and the same random numbers afterwards."""

    def reset_parameters(self) -> None:
        """Sets the initial weight, from a separate generator."""
        if self.weight.device.type != "meta":
            generator = torch.Generator(self.weight.device).manual_seed(torch.initial_seed() + 1)
            init.normal_(self.weight, std=self.in_features**-0.5, generator=generator)


class ImageFusion(nn.Module):
    """Modules that the fusion adds to an attention: an input projection if the dimensions differ, LN_img, biases, and
    a scale of the retrieval scores if they are used.

    Its parameters are read only in its own forward, because hooks of offloading and sharding load them there. All have
    the base's dtype, because FSDP2 allows one dtype a group. The score bias and the scale are stored as differences
    from their initial values: near -10, bfloat16 numbers are 1/16 apart, more than a training step changes them.
    """

    def __init__(self, options: FusionOptions):
        super().__init__()
        self.initial_logit_bias = options.logit_bias
        self.proj = None
        if options.image_dim != options.width:
            self.proj = ImageProjection(options.image_dim, options.width, bias=False)
        self.norm = nn.LayerNorm(options.width, eps=options.norm_eps)
        self.k_bias = nn.Parameter(torch.empty(options.kv_heads, options.key_dim))
        self.v_bias = nn.Parameter(torch.empty(options.kv_heads, options.value_dim))
        self.logit_bias_delta = nn.Parameter(torch.empty(options.heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the initial values of all but its modules."""
        for parameter in (self.k_bias, self.v_bias, self.logit_bias_delta):
            init.zeros_(parameter)

    def forward(self, image_pool: Tensor) -> FusionTerms:
        """image_pool: (U, E)."""
        images = image_pool.to(self.norm.weight.dtype)
        if self.proj is not None:
            images = self.proj(images)  # (U, C)
        wide = torch.promote_types(self.k_bias.dtype, torch.float32)
        # copies, because FSDP2 frees the parameters after this forward if it wraps this module by itself
        k_bias, v_bias = (bias.to(wide, copy=True) for bias in (self.k_bias, self.v_bias))
        logit_bias = self.initial_logit_bias + self.logit_bias_delta.to(wide)
        return FusionTerms(self.norm(images[None]), k_bias, v_bias, logit_bias)


class ImageHook:
    """A forward pre-hook of the fusion layer's attention, which turns the images of a call into `Images`.

    It hooks the attention, not the layer: gradient checkpointing reruns the layer's forward without the layer's hooks.

    Args:
        attention: of the fusion layer.
        own_config: config with the class's own implementation, which runs if no token sees an image.
    """

    def __init__(self, attention: nn.Module, own_config: Any):
        self.own_config = own_config
        self.names = tuple(inspect.signature(type(attention).forward).parameters)[1:]  # without self
        # its own tables, by which it rotates queries and keys
        self.has_tables = any("rotary" in name or "embed_positions" in name for name, _ in attention.named_buffers())

    def __call__(self, attention: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        arguments = named_arguments(self.names, args, kwargs) | getattr(_call, "images", {})
        pool, index = (arguments.pop(name, None) for name in IMAGE_ARGUMENTS)
        if pool is None or (pool.shape[0] == 0 and not attention.training):
            return (), arguments | self.as_base(attention)
        # elsewhere, reading the index would wait for the device
        readable = index.device.type == "cpu" and not torch.compiler.is_compiling()
        if not attention.training and readable and not (index >= 0).any():
            return (), arguments | self.as_base(attention)
        if pool.shape[0] == 0:  # add a row that no token sees, so that all parameters get gradients
            pool = pool.new_zeros(1, pool.shape[1])
        if not torch.compiler.is_compiling() and _adapts_rows(attention):
            raise ValueError(
                "PEFT's adapter_names and aLoRA choose an adapter for each row, but the rows of a batch share its "
                "images: call set_adapter with a LoRA that no token activates"
            )
        terms = attention.image_fusion(pool)
        as_text = terms.hidden_states.to(arguments["hidden_states"].dtype)  # the fusion's dtype may differ
        _, keys, values = catch(attention, self.at_no_position(attention, as_text, arguments))
        query = self.image_query(attention, arguments)
        if keys.shape[1] < len(terms.k_bias):
            terms = _of_own_heads(terms, attention)
        return (), arguments | {"images": Images(keys[0], values[0], index, query, terms)}

    def as_base(self, attention: Any) -> dict[str, Any]:
        """An argument for a call in which no token sees an image, which then gets the base's result to the bit. Empty
        in training, where the fusion layer has no dropout and all parameters get gradients, and in a graph."""
        if attention.training or torch.compiler.is_compiling():
            return {}
        return {"own": own_attention(attention, self.own_config)}

    def image_query(self, attention: Any, arguments: dict[str, Any]) -> Tensor | None:
        """The unrotated query of a call, (B, Hq, T, Dk). None if neither an argument nor the attention's own tables
        rotate it."""
        if arguments.get("position_embeddings") is None and not self.has_tables:
            return None
        return catch(attention, self.unrotated(attention, arguments))[0]

    def unrotated(self, attention: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call for the same tokens, unrotated, without mask and with a cache that stays unchanged.

        position_ids are zeroed only if the attention rotates by them: some families scale the query by them.
        """
        replaced = {}
        layer = arguments.get("layer_idx", getattr(attention, "layer_idx", 0))  # an argument in Zamba
        for name, value in arguments.items():
            if isinstance(value, Cache):
                value = TokensBefore(value.get_seq_length(layer))
            elif name == "attention_mask":
                value = None
            elif name == "use_cache":
                value = False
            elif name == "position_embeddings" and value is not None:
                value = identity_rotation(value)
            elif name == "position_ids" and value is not None and arguments.get("position_embeddings") is None:
                value = torch.zeros_like(value)
            elif isinstance(value, MutableMapping):  # such as keys that later layers read
                value = copy.copy(value)
            replaced[name] = value
        return replaced

    def at_no_position(self, attention: Any, hidden_states: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call for other `hidden_states` (B, T, C), without other tokens, rotation or scale."""
        replaced = self.unrotated(attention, alone(hidden_states, arguments))
        if replaced.get("position_ids") is not None:
            replaced["position_ids"] = torch.zeros_like(replaced["position_ids"])
        return replaced


def _adapts_rows(attention: nn.Module) -> bool:
    """Whether PEFT chooses an adapter for each row of this call, or activates it from some token on."""
    hooks = [hook for module in attention.modules() for hook in module._forward_pre_hooks.values()]
    return any(not {"adapter_names", "alora_offsets"}.isdisjoint(getattr(hook, "keywords", ())) for hook in hooks)


class _Ended(Exception):
    """Ends a call whose query, key and value are known. There is no other way out of a family's forward; the output
    projection would be computed for nothing, and its dropout would advance the random generator."""


class _Caught:
    """A function of the attention interface that stores query, key and value in `tensors` and ends the call."""

    tensors: Any = None

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.tensors = query, key, value
        if not torch.compiler.is_compiling():  # a compiler drops unused results by itself
            raise _Ended
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def catch(attention: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The query (B, Hq, T, Dk), key and value in a call with `arguments` of an attention whose implementation is
    IMPLEMENTATION."""
    caught = _Caught()
    try:  # noqa: SIM105 - torch.compile does not support contextlib.suppress
        attention.forward(**arguments, own=caught)
    except _Ended:
        pass
    if caught.tensors is None:
        raise gone(f"call of its attention interface in {type(attention).__name__}")
    return caught.tensors


def _of_own_heads(terms: FusionTerms, attention: nn.Module) -> FusionTerms:
    """The terms of the heads that this process computes, if tensor parallelism divides the attention's projections.
    Every process holds all parameters of the fusion and gets their complete gradients."""
    (mesh,) = {parameter.device_mesh for parameter in attention.parameters() if isinstance(parameter, DTensor)}

    def everywhere(tensor: Tensor) -> DTensor:
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)

    k_bias, v_bias, logit_bias = (
        everywhere(bias).redistribute(placements=[Shard(0)]).to_local()
        for bias in (terms.k_bias, terms.v_bias, terms.logit_bias)
    )
    return FusionTerms(terms.hidden_states, k_bias, v_bias, logit_bias)


# By thread: the images during the forward of a layer that does not pass them on.
_call = threading.local()


class VisualLayer(_Module):
    """Mixin of a decoder layer whose forward drops unknown arguments (Nemotron, StableLM). It stores the images where
    the attention's hook finds them. A hook of the layer cannot: gradient checkpointing does not rerun it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _call.images = {name: kwargs.pop(name) for name in FUSION_ARGUMENTS if name in kwargs}
        try:
            return super().forward(*args, **kwargs)
        finally:
            _call.images = {}


def visual_layer_class(base: Any) -> Any:
    return subclass(VisualLayer, base, visual_layer_class)


@torch.no_grad()
def check_mathematics(attention: Any, own_config: Any, calls: list[AttentionCall]) -> None:
    """Checks that a token that sees itself and one image gets the class's own attention over two such tokens.

    The check runs unrotated and at the last position of each call, with and without a cache. It uses several tokens,
    because the softmax of a single token may be almost all on the image or on the token.

    Args:
        attention: its implementation is IMPLEMENTATION.
        own_config: config with the class's own implementation.
        calls: calls without a cache, at near and far positions.

    Raises:
        ValmError: the results differ, because the family computes more than one softmax over what a token sees,
            changes queries or keys after their rotation, or scales keys by their position.
    """
    hook = ImageHook(attention, own_config)
    text = calls[0].arguments["hidden_states"][0]  # (T, C)
    pairs = torch.stack([text[:-1], text[1:]], 1)  # (T - 1, 2, C)
    query, keys, values = catch(attention, hook.at_no_position(attention, pairs[None, :, 0], calls[0].arguments))
    logit_bias = text.new_zeros(query.shape[1])
    k_bias, v_bias = (text.new_zeros(x.shape[1], x.shape[3]) for x in (keys, values))
    terms = FusionTerms(text, k_bias, v_bias, logit_bias)
    image = torch.arange(len(pairs), device=text.device)
    index = torch.stack([torch.full_like(image, -1), image], 1)[..., None]  # (T - 1, 2, 1): second tokens only
    itself = torch.eye(2, dtype=torch.bool, device=text.device)[None, None]
    cache_names = [name for name in CACHE_ARGUMENTS if name in hook.names]
    # quantised projections may round their inputs to 8 bits, the precision of bfloat16
    is_quantised = any(quantisation(weight) for weight in attention.parameters())
    for call, cached, rotated in itertools.product(calls, (False, True), (False, True)):
        cache = TokensBefore(call.position - 1) if cached else None
        placed = alone(pairs, call.arguments) | dict.fromkeys(cache_names, cache)
        images = Images(keys[0], values[0], index, hook.image_query(attention, placed), terms)
        if not rotated:
            placed = hook.unrotated(attention, placed)
        with_image = attention.forward(**placed | {"attention_mask": itself}, images=images)[0][:, -1]
        config, attention.config = attention.config, own_config
        try:
            own = attention.forward(**placed)[0][:, -1]
        finally:
            attention.config = config
        error = ((with_image - own).abs().max() / own.abs().max()).item()
        if not error <= torch.finfo(torch.bfloat16 if is_quantised else own.dtype).eps ** 0.5:
            why = "is not one softmax over all that a token sees"
            if call.position >= len(text):
                why = f"computes something else at position {call.position}"
            elif rotated:
                why = "changes queries or keys after their rotation"
            raise ValmError(
                f"{type(attention).__name__} {why}: with images it would be off by {error:.1e} of its largest value"
            )


def fusion_attention(
    module: nn.Module,
    query: Tensor,  # (B, Hq, Tq, Dk)
    key: Tensor,  # (B, Hkv, Tk, Dk)
    value: Tensor,  # (B, Hkv, Tk, Dv)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    images: Images | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    text_limits: TextLimits | None = None,
    read_weights: Callable[..., None] | None = None,
    own: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: returns (B, Tq, Hq, Dv) and no weights. Without dropout.

    text_limits: the limits in the mask, if known. Otherwise they are read from it, except in a compiled graph.
    read_weights: called with the arguments of `joint_weights`.
    own: a function of the interface that is called instead, such as the class's own.
    softcap, position_bias and s_aux (a sink: one more score per head, without a value) come from the families.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, softcap, position_bias, s_aux)
    num_queries, num_keys = query.shape[2], key.shape[2]
    seen = visible_keys(attention_mask)
    if read_weights is not None:
        read_weights(query, key, images, seen, scoring)
    if own is not None:
        given = {"scaling": scaling, "softcap": softcap, "position_bias": position_bias, "s_aux": s_aux}
        given = {name: value for name, value in given.items() if value is not None}
        return own(module, query, key, value, attention_mask, dropout=dropout, **given, **kwargs)
    if seen is None and 1 < num_queries < num_keys:  # a static cache during prefill
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
    if text_limits is None and not torch.compiler.is_compiling():
        text_limits = read_limits(seen)
    reason = why_joint_eager(query, value, position_bias, seen, text_limits)
    if reason is None:
        out = _kernel_attention(query, key, value, images, text_limits, scoring)
    else:
        out = joint_attention(query, key, value, images, seen, scoring)
    return out.transpose(1, 2).contiguous(), None


def why_joint_eager(
    query: Tensor,
    value: Tensor,
    position_bias: Tensor | None,
    seen: Tensor | None = None,
    text_limits: TextLimits | None = None,
) -> str | None:
    """Why `visual_fusion_attn` cannot serve these tensors, or None if it can.

    text_limits: the limits in the mask `seen`; None if the mask has holes or was not read. A compiled graph cannot read
    a mask; it then uses the joint attention, which is correct for every mask.
    """
    widest = max(query.shape[-1], value.shape[-1])
    if not MIN_HEAD_DIM <= widest <= MAX_HEAD_DIM:
        return f"head dimension {widest}"
    if position_bias is not None:
        return "position bias"
    if seen is not None and text_limits is None:
        return "mask in a compiled graph" if torch.compiler.is_compiling() else "mask with holes"
    return None


def visible_keys(attention_mask: Tensor | None) -> Tensor | None:
    """(B or 1, Tq, Tk) bool from the mask that transformers prepared, True where a query sees a key. Raises ValmError
    if the mask is not a tensor of four dimensions."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
        raise ValmError(
            f"the fusion layer cannot read an attention mask of type {type(attention_mask).__name__}: load the model "
            'with attn_implementation="sdpa" or "eager"'
        )
    mask = attention_mask[:, 0]
    return mask if mask.dtype == torch.bool else mask == 0


def read_limits(seen: Tensor | None) -> TextLimits | None:
    """The limits in the mask `seen` (B, Tq, Tk); None without a mask, or if it has holes.

    In a mask without holes, each query sees all keys from some key to its own, or none. The queries are the last tokens
    of the text; a static cache contains unused keys after them. This synchronises with a GPU, as transformers does when
    it looks for padding.
    """
    if seen is None:
        return None
    num_queries, num_keys = seen.shape[1:]
    key = torch.arange(num_keys, device=seen.device)
    sees = seen.any(-1)  # (B, Tq)
    first_key = torch.where(sees, seen.int().argmax(-1), num_keys)
    later = torch.arange(num_queries - 1, -1, -1, device=seen.device)  # (Tq,): queries behind each
    end = num_keys - seen.flip(-1).int().argmax(-1)  # (B, Tq): one past the last key that each sees
    seqlens = torch.where(sees, end + later, 0).amax(-1)  # (B,)
    interval = (key >= first_key[..., None]) & (key < (seqlens[:, None] - later)[..., None])
    # seqlens > num_keys: an encoder's mask, in which earlier queries also see the last key
    whole = (interval == seen).all() & (seqlens <= num_keys).all()
    whole, full, limited = torch.stack([whole, (seqlens == num_keys).all(), first_key.any()]).tolist()
    if not whole:
        return None
    return TextLimits(first_key.int() if limited else None, None if full else seqlens.int())


def _kernel_attention(
    query: Tensor, key: Tensor, value: Tensor, images: Images | None, text_limits: TextLimits | None, scoring: Scoring
) -> Tensor:
    """(B, Hq, Tq, Dv) by `visual_fusion_attn`."""
    value_dim, widest = value.shape[-1], max(query.shape[-1], value.shape[-1])
    batch = query.shape[0]
    first_key, seqlens = text_limits or TextLimits()
    arguments = image_arguments(query, images, widest)
    image_k = image_v = None
    if images is not None:
        image_k, image_v = _widened(images.keys, widest), _widened(images.values, widest)
        arguments["image_v_bias"] = _widened(images.terms.v_bias, widest)
    query, key, value = (_widened(tensor, widest) for tensor in (query, key, value))
    out, lse = visual_fusion_attn(
        query,
        key,
        value,
        image_k,
        image_v,
        **arguments,
        first_key=None if first_key is None else first_key.expand(batch, -1),
        cache_seqlens=None if seqlens is None else seqlens.expand(batch),
        scale=scoring.scale,
        softcap=scoring.softcap,
        return_lse=True,
    )
    if scoring.sink is not None:  # the sink's share of the softmax has no value
        out = out * without_sink(lse, scoring.sink)[..., None].to(out.dtype)
    return out[..., :value_dim]


def image_arguments(query: Tensor, images: Images | None, width: int) -> dict[str, Any]:
    """The image arguments of `visual_fusion_attn` and `attention_weights`, except keys and values."""
    if images is None:
        return {}
    arguments: dict[str, Any] = {
        "image_index": images.image_index,
        "image_k_bias": _widened(images.terms.k_bias, width),
        "image_logit_bias": images.terms.logit_bias.to(torch.promote_types(query.dtype, torch.float32)),
    }
    if images.query is not None:
        arguments["image_q"] = _widened(images.query, width)
    return arguments


def without_sink(lse: Tensor, sink: Tensor) -> Tensor:
    """(B, Hq, Tq): the share of the softmax that a sink (Hq,) leaves to scores with the logsumexp `lse` (B, Hq, Tq)."""
    return torch.sigmoid(lse - sink.reshape(1, -1, 1))


def _widened(tensor: Tensor, width: int) -> Tensor:
    """The tensor with its last dimension padded by zeros, which change no product."""
    return tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1]))


def joint_attention(
    query: Tensor, key: Tensor, value: Tensor, images: Images | None, seen: Tensor | None, scoring: Scoring
) -> Tensor:
    """(B, Hq, Tq, Dv): attention with all scores in memory, for any mask, bias and dimension.

    seen: (B or 1, Tq, Tk) bool, None = causal. A query that sees nothing gets zeros.
    """
    text, image = joint_weights(query, key, images, seen, scoring)
    group = query.shape[1] // key.shape[1]
    out = text.to(query.dtype) @ value.repeat_interleave(group, 1)
    if images is not None:
        pool = (images.values + images.terms.v_bias[:, None]).to(query.dtype)  # (Hkv, U, Dv)
        of_each = pool[:, images.image_index.clamp(min=0).long()]  # (Hkv, B, Tq, K, Dv)
        image_v = of_each.repeat_interleave(group, 0).transpose(0, 1)
        out = out + (image.to(query.dtype)[..., None, :] @ image_v)[..., 0, :]
    return out


def joint_weights(
    query: Tensor, key: Tensor, images: Images | None, seen: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """The weights of `joint_attention` over text (B, Hq, Tq, Tk) and over images (B, Hq, Tq, K), at least float32."""
    bias = query.new_zeros(1, 1, query.shape[2], key.shape[2], dtype=torch.promote_types(query.dtype, torch.float32))
    if scoring.position_bias is not None:
        bias = bias + scoring.position_bias
    if seen is not None:
        bias = bias.masked_fill(~seen[:, None], -torch.inf)
    text, image, lse = attention_weights(
        query,
        key,
        None if images is None else images.keys,
        **image_arguments(query, images, query.shape[-1]),
        text_bias=bias,
        causal=seen is None,
        scale=scoring.scale,
        softcap=scoring.softcap,
    )
    if scoring.sink is not None:
        share = without_sink(lse, scoring.sink)[..., None]
        text, image = text * share, image * share
    return text, image


AttentionInterface.register(IMPLEMENTATION, fusion_attention)
