"""The packed layout: all tokens in one dimension, documents by cu_seqlens, like flash-attention's varlen functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from .api import visual_fusion_attn
from .checks import check_tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .api import PackedOptions

# The options with a token dimension; a batch of one is put before it.
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
    """`visual_fusion_attn` for packed documents: all tokens in one dimension, without a batch and without padding.

    It calls `visual_fusion_attn` with views of the arguments as a batch of one. Nothing is copied, and out and the
    gradients are laid out like the arguments.

    Args: T is the number of all tokens; dtypes and devices are those of `visual_fusion_attn`.

        q: (T, Hq, D).
        k, v: (T, Hkv, D).
        image_k, image_v: a pool (Hkv, U, D) with image_index, or each token's own images (T, K, Hkv, D), or None.
        cu_seqlens: (N + 1,) int32 or int64, rising from 0 to T: document n is the tokens from cu_seqlens[n] to
            cu_seqlens[n + 1] - 1.
        return_lse, return_image_weights: also return lse, and the weights of the images.
        options: the other arguments of `visual_fusion_attn`, except causal and cache_seqlens. Arguments for tokens
            have no batch dimension: image_q (T, Hq, D), image_index (T, K) or by key head (Hkv, T, K), image_mask and
            image_score_bias (T, K), first_key (T,), counted from the first of all tokens.

    Returns:
        out (T, Hq, D). With return_lse also lse (Hq, T), with return_image_weights also the weights (Hq, T, K).

    Raises:
        TypeError, ValueError: as `visual_fusion_attn`, whose messages name the shapes with a batch of one.

    Example:
        >>> q, k, v = torch.randn(3, 5, 2, 8)  # each T H D
        >>> image_k, image_v = torch.randn(2, 2, 10, 8)  # each H U D
        >>> image_index = torch.randint(10, (5, 3))  # T K
        >>> cu_seqlens = torch.tensor([0, 2, 5])  # two documents, of 2 and 3 tokens
        >>> valm_kernels.visual_fusion_attn_varlen(q, k, v, image_k, image_v, cu_seqlens, image_index=image_index).shape
        torch.Size([5, 2, 8])
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
    """A pool unchanged, or (T, K, Hkv, D) as (1, Hkv, T, K, D)."""
    return image.permute(2, 0, 1, 3)[None] if isinstance(image, Tensor) and image.dim() == 4 else image
