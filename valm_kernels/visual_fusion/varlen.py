"""The packed layout: all tokens in one dimension, documents by cu_seqlens, as flash-attention's varlen functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from .api import visual_fusion_attn
from .checks import check_tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .api import PackedOptions

# The options with a token dimension, which gets a batch of one before it.
_OF_TOKENS = ("image_index", "image_mask", "image_score_bias", "first_key")


# fmt: off
@overload
def visual_fusion_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, image_k: Tensor | None, image_v: Tensor | None, cu_seqlens: Tensor, *,
    return_lse: Literal[False] = False, return_image_weights: Literal[False] = False, **options: Unpack[PackedOptions],
) -> Tensor: ...
@overload
def visual_fusion_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, image_k: Tensor | None, image_v: Tensor | None, cu_seqlens: Tensor, *,
    return_lse: bool = False, return_image_weights: bool = False, **options: Unpack[PackedOptions],
) -> tuple[Tensor, ...]: ...
# fmt: on
def visual_fusion_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_k: Tensor | None,
    image_v: Tensor | None,
    cu_seqlens: Tensor,
    *,
    return_lse: bool = False,
    return_image_weights: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """`visual_fusion_attn` for documents that lie one after the other, with neither a batch nor padding.

    It calls `visual_fusion_attn` with a batch of one, whose tensors are views: no argument is copied, and out and the
    gradients are laid out as the arguments are.

    Args: T is the number of all tokens; dtypes and devices are those of `visual_fusion_attn`.

        q: (T, Hq, D).
        k, v: (T, Hkv, D), of the same tokens.
        image_k, image_v: (Hkv, U, D), a pool, with image_index; or (T, K, Hkv, D), each token's own images; or None.
        cu_seqlens: (N + 1,) int32 or int64: document n is the tokens from cu_seqlens[n] to cu_seqlens[n + 1] - 1. It
            rises from 0 to T.
        return_lse, return_image_weights: return these after out.
        options: max_seqlen and the others of `visual_fusion_attn`, but causal and cache_seqlens. Those of tokens
            have no batch: image_q (T, Hq, D); image_index (T, K), or (Hkv, T, K) by key head; image_mask (T, K);
            image_score_bias (T, K); first_key (T,), counted from the first of all tokens.

    Returns:
        out (T, Hq, D); with return_lse also lse (Hq, T), with return_image_weights also the weights (Hq, T, K).

    Raises:
        TypeError, ValueError: as `visual_fusion_attn`, whose messages name the shapes with a batch of one.
    """
    text: dict[str, Any] = {"q": q, "k": k, "v": v}
    if options.get("image_q") is not None:
        text["image_q"] = options["image_q"]
    for name, x in text.items():
        check_tensor(name, x)
        if x.dim() != 3:
            heads = "Hkv" if name in "kv" else "Hq"
            raise ValueError(f"{name} must have 3 dimensions (T, {heads}, D), got shape {tuple(x.shape)}")
    check_tensor("cu_seqlens", cu_seqlens)
    for name in ("k", "v"):
        if len(text[name]) != len(q):
            raise ValueError(f"{name} must have the {len(q)} tokens of q, got shape {tuple(text[name].shape)}")
    arguments = options | {name: x.transpose(0, 1)[None] for name, x in text.items()}
    arguments |= {name: options[name][None] for name in _OF_TOKENS if options.get(name) is not None}
    arguments |= {"image_k": _images(image_k), "image_v": _images(image_v), "cu_seqlens": cu_seqlens}
    arguments |= {"return_lse": return_lse, "return_image_weights": return_image_weights}
    results = visual_fusion_attn(**arguments)
    if isinstance(results, Tensor):
        return results[0].transpose(0, 1)
    out, *others = results
    return out[0].transpose(0, 1), *(x[0] for x in others)


def _images(image: Any) -> Any:
    """A pool as it is; (T, K, Hkv, D) as (1, Hkv, T, K, D)."""
    return image.permute(2, 0, 1, 3)[None] if isinstance(image, Tensor) and image.dim() == 4 else image
