"""Argument checks of visual_fusion: each error names the argument, what was expected and what came.

The checks at the end read the values of tensors. Implementations call them, because on CUDA they wait for the device.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .inputs import TENSOR_NAMES, Inputs

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256
MAX_IMAGES = 64
# scale and softcap must be from 2**-RANGE to 2**RANGE, so that scores and their gradients are finite in float32.
RANGE = 60
# The tensors with the dtype of q.
LIKE_Q = ("q", "k", "v", "image_k", "image_v", "image_q")
_DEFAULTS: dict[str, Any] = dict.fromkeys(Inputs._fields) | {"causal": True}


def _dtypes(q: torch.dtype) -> dict[str, tuple[torch.dtype, ...]]:
    """The dtypes that each tensor may have if q has this dtype."""
    wide = torch.promote_types(q, torch.float32)
    others = {
        "image_index": (torch.int32, torch.int64),
        "image_mask": (torch.bool,),
        "image_k_bias": (q, wide),
        "image_v_bias": (q, wide),
        "image_logit_bias": (wide,),
        "image_score_bias": (wide,),
        "first_key": (torch.int32,),
        "cu_seqlens": (torch.int32, torch.int64),
        "cache_seqlens": (torch.int32,),
    }
    return dict.fromkeys(TENSOR_NAMES, (q,)) | others


_DTYPES = {q: _dtypes(q) for q in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}


def checked_inputs(*, any_dim: bool = False, **given: Any) -> Inputs:
    """The arguments with their defaults.

    Args:
        any_dim: whether a head may have any dimension.
        given: the arguments by their names in `Inputs`, cast to the autocast dtype; q is a tensor.

    Raises:
        TypeError, ValueError: as `visual_fusion_attn`, except for the values of tensors.
    """
    given = _DEFAULTS | given
    _check_tensors(given)
    check_bool("causal", given["causal"])
    for name in ("scale", "softcap"):
        if given[name] is not None:
            _check_positive_number(name, given[name])
            given[name] = float(given[name])
    q = given["q"]
    _check_text_shapes(q, given["k"], given["v"])
    if not any_dim and not MIN_HEAD_DIM <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"q must have a head_dim D from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {q.shape[-1]}")
    if given["scale"] is None:
        given["scale"] = q.shape[-1] ** -0.5
    inputs = Inputs(**given)
    num_images = _check_image_shapes(inputs)
    _check_option_shapes(inputs, num_images)
    if inputs.cu_seqlens is not None:
        _check_documents(inputs, inputs.cu_seqlens)
    elif inputs.max_seqlen is not None:
        raise ValueError("max_seqlen is the length of the longest document in cu_seqlens: give cu_seqlens too")
    return inputs.without_images() if inputs.image_k is None else inputs


def check_text_bias(text_bias: Tensor, inputs: Inputs) -> None:
    check_tensor("text_bias", text_bias)
    if text_bias.device != inputs.q.device:
        raise ValueError(f"text_bias must be on the device of q, {inputs.q.device}, but is on {text_bias.device}")
    if not text_bias.is_floating_point():
        raise TypeError(f"text_bias must be floating point, got {text_bias.dtype}")
    batch, heads, num_queries, _ = inputs.q.shape
    shape, tokens = text_bias.shape, (num_queries, inputs.k.shape[2])
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2:] != tokens:
        expected = (batch, heads, *tokens)
        raise ValueError(f"text_bias must have shape (B or 1, Hq or 1, Tq, Tk), here {expected}, got {tuple(shape)}")


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {'None' if value is None else type(value).__name__}")


def _check_tensors(given: dict[str, Any]) -> None:
    """Checks types, devices and dtypes."""
    dtype, device = given["q"].dtype, given["q"].device
    if dtype not in _DTYPES:
        raise TypeError(f"q must be float32, float16, bfloat16 or float64, got {dtype}")
    for name, dtypes in _DTYPES[dtype].items():
        tensor = given[name]
        if tensor is None and name not in ("k", "v"):
            continue
        check_tensor(name, tensor)
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of q, {device}, but is on {tensor.device}")
        if tensor.dtype not in dtypes:
            if name in LIKE_Q:
                raise TypeError(f"{name} must have the dtype of q, {dtype}, got {tensor.dtype}")
            names = " or ".join(dict.fromkeys(str(d) for d in dtypes))
            raise TypeError(f"{name} must be {names} for a {dtype} q, got {tensor.dtype}")


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def _check_positive_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or None, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    if not 2**-RANGE <= value <= 2**RANGE:
        raise ValueError(
            f"{name} must be from 2**-{RANGE} to 2**{RANGE}, as scores are computed in float32, got {value}"
        )


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name} must have shape {meaning} = {tuple(expected)}, got {tuple(tensor.shape)}")


def _check_text_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor, meaning in (("q", q, "(B, Hq, Tq, D)"), ("k", k, "(B, Hkv, Tk, D)"), ("v", v, "(B, Hkv, Tk, D)")):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions {meaning}, got shape {tuple(tensor.shape)}")
        if tensor.shape[1] == 0 or tensor.shape[3] == 0:
            raise ValueError(f"{name} must have heads and a head_dim D, got shape {tuple(tensor.shape)}")
    batch, query_heads, num_queries, head_dim = q.shape
    _, kv_heads, num_keys, _ = k.shape
    _check_shape("k", k, (batch, kv_heads, num_keys, head_dim), "(B, Hkv, Tk, D)")
    _check_shape("v", v, k.shape, "(B, Hkv, Tk, D) of k")
    if query_heads % kv_heads:
        raise ValueError(f"q must have a multiple of k's {kv_heads} heads, got {query_heads}")
    if num_keys < num_queries:
        raise ValueError(f"k must have at least as many tokens as q (Tk >= Tq), got {num_keys} < {num_queries}")


def _check_image_shapes(inputs: Inputs) -> int:
    """Checks image_k, image_v, image_q, image_index and image_mask; returns K."""
    q, k, _, image_k, image_v, image_q, image_index, image_mask = inputs[:8]
    batch, _, num_queries, head_dim = q.shape
    kv_heads = k.shape[1]

    if image_q is not None:
        _check_shape("image_q", image_q, q.shape, "q.shape")
    if image_index is not None and image_mask is not None:
        raise ValueError("image_mask belongs to the dense layout: in the pooled layout put -1 into image_index instead")
    slots_name, slots = ("image_index", image_index) if image_index is not None else ("image_mask", image_mask)
    if slots is not None:
        if inputs.by_head:
            by_head = (batch, kv_heads, num_queries, slots.shape[3])
            _check_shape(slots_name, slots, by_head, "(B, Tq, K) or (B, Hkv, Tq, K)")
        elif slots.dim() == 3:
            _check_shape(slots_name, slots, (batch, num_queries, slots.shape[2]), "(B, Tq, K)")
        else:
            or_by_head = "" if image_index is None else " or 4, (B, Hkv, Tq, K)"
            raise ValueError(
                f"{slots_name} must have 3 dimensions (B, Tq, K){or_by_head}, got shape {tuple(slots.shape)}"
            )

    if (image_k is None) != (image_v is None):
        missing, given = ("image_k", "image_v") if image_k is None else ("image_v", "image_k")
        raise ValueError(f"{missing} must be given together with {given}, got None")
    if image_k is None or image_v is None:
        if slots is not None and slots.shape[-1] > 0:
            raise ValueError(f"image_k must be given for the {slots.shape[-1]} slots of {slots_name}, got None")
        return 0

    if image_index is None:
        if image_k.dim() != 5:
            hint = "; the pooled layout (Hkv, U, D) needs image_index" if image_k.dim() == 3 else ""
            raise ValueError(
                f"image_k must have 5 dimensions (B, Hkv, Tq, K, D), got shape {tuple(image_k.shape)}{hint}"
            )
        num_images = image_k.shape[3]
        _check_shape("image_k", image_k, (batch, kv_heads, num_queries, num_images, head_dim), "(B, Hkv, Tq, K, D)")
        if image_mask is not None:
            _check_shape("image_mask", image_mask, (batch, num_queries, num_images), "(B, Tq, K)")
    else:
        if image_k.dim() != 3:
            raise ValueError(
                f"image_k must have 3 dimensions (Hkv, U, D) with image_index, got shape {tuple(image_k.shape)}"
            )
        num_images = image_index.shape[-1]
        _check_shape("image_k", image_k, (kv_heads, image_k.shape[1], head_dim), "(Hkv, U, D)")
    _check_shape("image_v", image_v, image_k.shape, "image_k.shape")
    if num_images > MAX_IMAGES:
        raise ValueError(f"image_k must have at most {MAX_IMAGES} images per token (K), got {num_images}")
    return num_images


def _check_option_shapes(inputs: Inputs, num_images: int) -> None:
    batch, query_heads, num_queries, head_dim = inputs.q.shape
    of_key_heads = (inputs.k.shape[1], head_dim)
    k_bias, v_bias, logit_bias, score_bias, first_key, cache_seqlens = inputs[8:14]
    if k_bias is not None:
        _check_shape("image_k_bias", k_bias, of_key_heads, "(Hkv, D)")
    if v_bias is not None:
        _check_shape("image_v_bias", v_bias, of_key_heads, "(Hkv, D)")
    if logit_bias is not None:
        _check_shape("image_logit_bias", logit_bias, (query_heads,), "(Hq,)")
    if score_bias is not None:
        _check_shape("image_score_bias", score_bias, (batch, num_queries, num_images), "(B, Tq, K)")
    if first_key is not None:
        _check_shape("first_key", first_key, (batch, num_queries), "(B, Tq)")
    if cache_seqlens is not None:
        _check_shape("cache_seqlens", cache_seqlens, (batch,), "(B,)")


def _check_documents(inputs: Inputs, cu_seqlens: Tensor) -> None:
    batch, max_seqlen = inputs.q.shape[0], inputs.max_seqlen
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] <= batch:
        raise ValueError(
            f"cu_seqlens must have shape (N + 1,) with at least one document for each of the {batch} rows, got "
            f"{tuple(cu_seqlens.shape)}"
        )
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int)):
        raise TypeError(f"max_seqlen must be an int or None, got {type(max_seqlen).__name__}")
    if max_seqlen is not None and max_seqlen < 1:
        raise ValueError(f"max_seqlen must be at least 1, got {max_seqlen}")
    if not inputs.causal:
        raise ValueError("cu_seqlens needs causal=True: without it a query would see the documents after its own")
    if inputs.cache_seqlens is not None:
        raise ValueError("cu_seqlens cannot be combined with cache_seqlens: give first_key instead")


def check_pool(inputs: Inputs) -> None:
    """Checks the values of image_index, which on CUDA waits for the device.

    Raises:
        ValueError: an index is outside [-1, U).
    """
    if inputs.image_index is not None and inputs.image_k is not None:
        last = inputs.image_k.shape[1] - 1
        rule = f"image_index must be -1 (no image) or a row of the pool from 0 to {last}"
        _check_range(inputs.image_index, -1, last, rule)


def check_cache_seqlens(cache_seqlens: Tensor, num_keys: int) -> None:
    """Checks the values of cache_seqlens, which on CUDA waits for the device.

    Raises:
        ValueError: a length is outside [0, num_keys].
    """
    rule = f"cache_seqlens must be from 0 to {num_keys}, the number of keys (Tk)"
    _check_range(cache_seqlens, 0, num_keys, rule)


def _check_range(values: Tensor, least: int, most: int, rule: str) -> None:
    if torch.compiler.is_compiling():  # a graph cannot read values; unchecked ones would give wrong results
        torch._assert_async(((values >= least) & (values <= most)).all(), rule)
        return
    if values.numel() == 0 or values.is_meta:
        return
    for found in map(int, torch.aminmax(values)):
        if not least <= found <= most:
            raise ValueError(f"{rule}, got {found}")


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, num_keys: int, max_seqlen: int | None) -> None:
    """Checks the values of cu_seqlens, which on CUDA waits for the device.

    Raises:
        ValueError: the values do not rise from 0 to batch * num_keys, or a document is in two rows or longer than
            max_seqlen.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != batch * num_keys:
        raise ValueError(
            f"cu_seqlens must begin with 0 and end with {batch * num_keys}, the number of keys (B Tk), got {bounds[0]} "
            f"and {bounds[-1]}"
        )
    for n, (start, end) in enumerate(pairwise(bounds)):
        if start > end:
            raise ValueError(f"cu_seqlens must not fall, but document {n} begins at {start} and ends at {end}")
        if max_seqlen is not None and end - start > max_seqlen:
            raise ValueError(f"max_seqlen is {max_seqlen}, but document {n} of cu_seqlens has {end - start} tokens")
        if start < end and start // num_keys != (end - 1) // num_keys:
            raise ValueError(
                f"cu_seqlens must contain the bound of each row of {num_keys} keys, but document {n}, {start} to "
                f"{end}, is in two rows"
            )
