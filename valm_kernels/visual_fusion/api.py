"""The public functions visual_fusion_attn and attention_weights: autocast and the choice of an implementation."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from ..native import survives_fork
from . import flash
from .autocast import is_autocast_enabled, outside_autocast
from .checks import LIKE_Q, check_bool, check_tensor, check_text_bias, checked_inputs
from .inputs import Inputs
from .op import document_starts, fused_attention
from .reference import joint_softmax, reference_attention

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in `typing` from Python 3.11 on

IMPLS = ("auto", "triton", flash.NAME, "cpu", "reference")
HAS_TRITON = importlib.util.find_spec("triton") is not None
# The kernels need tensor cores for bfloat16 and asynchronous copies to shared memory.
MIN_CAPABILITY = (8, 0)
# Written by `make gpu-check` if all tests have passed on a GPU.
MEASURED_TILES = Path(__file__).parent / "triton" / "measured_tiles.json"


class PackedOptions(TypedDict, total=False):
    """The keyword arguments of `visual_fusion_attn_varlen`, except those that decide what it returns."""

    image_q: Tensor | None
    softcap: float | None
    image_index: Tensor | None
    image_mask: Tensor | None
    image_k_bias: Tensor | None
    image_v_bias: Tensor | None
    image_logit_bias: Tensor | None
    image_score_bias: Tensor | None
    first_key: Tensor | None
    max_seqlen: int | None
    scale: float | None
    impl: str


class Options(PackedOptions, total=False):
    """The keyword arguments of `visual_fusion_attn`, except those that decide what it returns."""

    cu_seqlens: Tensor | None
    cache_seqlens: Tensor | None
    causal: bool


# fmt: off
@overload
def visual_fusion_attn(
    q: Tensor, k: Tensor, v: Tensor, image_k: Tensor | None, image_v: Tensor | None, *,
    return_lse: Literal[False] = False, return_image_weights: Literal[False] = False, **options: Unpack[Options],
) -> Tensor: ...
@overload
def visual_fusion_attn(
    q: Tensor, k: Tensor, v: Tensor, image_k: Tensor | None, image_v: Tensor | None, *,
    return_lse: Literal[True], return_image_weights: Literal[False] = False, **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def visual_fusion_attn(
    q: Tensor, k: Tensor, v: Tensor, image_k: Tensor | None, image_v: Tensor | None, *,
    return_lse: bool = False, return_image_weights: Literal[True], **options: Unpack[Options],
) -> tuple[Tensor, ...]: ...
# fmt: on
def visual_fusion_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_k: Tensor | None,
    image_v: Tensor | None,
    *,
    image_q: Tensor | None = None,
    softcap: float | None = None,
    image_index: Tensor | None = None,
    image_mask: Tensor | None = None,
    image_k_bias: Tensor | None = None,
    image_v_bias: Tensor | None = None,
    image_logit_bias: Tensor | None = None,
    image_score_bias: Tensor | None = None,
    first_key: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cache_seqlens: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    return_image_weights: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Attention of every token over its text and its own K images, with one softmax over both.

    The weights are softmax([s | t]), with text scores s = scale * q.k and image scores t = scale * image_q.(image_k +
    image_k_bias) + image_logit_bias + image_score_bias. `out` is the weighted sum of v and image_v + image_v_bias, and
    lse the logarithm of the softmax's denominator (Wang et al., "Visually-Augmented Language Modeling", eq. 3 to 7).
    Query i sees the keys up to i + Tk - Tq. A query that sees nothing gets zeros, lse -inf and zero gradient.

    Results are differentiable once, by autograd or torch.func (grad, vjp, jacrev, vmap). Second derivatives and forward
    mode raise, except with impl="reference". vmap calls the kernels once for each example, as PyTorch's fallback does,
    which warns. Under torch.autocast, q, k, v, image_k, image_v and image_q are cast.
    docs/reference/valm_kernels.md has the formula, the layouts, the dispatch and the limits of each implementation.

    Args:
        q: (B, Hq, Tq, D) float32, float16 or bfloat16, any strides, D from 8 to 256. "cpu" and "reference" also take
            float64.
        k, v: (B, Hkv, Tk, D), dtype of q. Hq is a multiple of Hkv (grouped-query attention). Tk >= Tq: the first
            Tk - Tq keys are a prefix, such as a KV cache. B and Tq may be 0: results are then empty, gradients 0. NaN
            or infinity may also reach queries that do not see its key. Only keys from cache_seqlens on, masked images
            and unused rows of the pool may hold it.
        image_k, image_v: keys and values of the images, dtype of q: dense, (B, Hkv, Tq, K, D), or a pool (Hkv, U, D)
            with image_index. K is at most 64. None for both means no images. K and U may be 0: gradients are then 0.
        image_q: (B, Hq, Tq, D), dtype of q: the query of the image scores, by default q. In a rotary model pass the
            query before rotation, so that every image stands at its token's position.
        softcap: cap c of the scores, from `2**-60` to `2**60`: a product x becomes c tanh(x / c), before the two score
            biases are added (Gemma 2). None means no cap.
        image_index: (B, Tq, K) int32 or int64, rows of the pool; -1 means no image. With (B, Hkv, Tq, K) each key head
            sees its own images. An index outside [-1, U) raises on CPU. On CUDA it is undefined behaviour, unless the
            environment variable VALM_KERNELS_CHECK_INDEX is 1: then every call checks, which waits for the device.
        image_mask: (B, Tq, K) bool, dense layout only; False means no image.
        image_k_bias, image_v_bias: (Hkv, D), dtype of q or float32, added to the key and the value of every image.
        image_logit_bias: (Hq,) float32 (float64 for a float64 q), added to every image score of a head.
        image_score_bias: (B, Tq, K) float32 (float64 for a float64 q), added to an image's score in all heads, such as
            its retrieval score. -inf gives a finite image the weight 0. Do not use a large negative number instead: the
            float32 lse of a query that sees nothing else cannot tell such scores apart.
        first_key: (B, Tq) int32, the first text key that each query sees, for left padding, packed documents and
            sliding windows; values <= 0 mean all keys. It does not limit images.
        cu_seqlens: (N + 1,) int32 or int64: document n is the keys from cu_seqlens[n] to cu_seqlens[n + 1] - 1 of the B
            concatenated rows, as in flash-attention. It rises from 0 to B Tk and contains the bound of each row. A
            query sees only text of its own document, from first_key on if given. Needs causal=True and no
            cache_seqlens. Wrong values raise on CPU and are undefined behaviour on CUDA.
        max_seqlen: an upper bound of the documents' lengths in cu_seqlens, by default Tk, so that "flash+triton" starts
            fewer programs. A longer document raises on CPU and is undefined behaviour on CUDA.
        cache_seqlens: (B,) int32, the number of keys in each row, including this call's, for a cache of constant size
            Tk (StaticCache, CUDA graphs). It replaces Tk in the causal limit, and later keys and values are not
            used. Values outside 0 to Tk raise on CPU and are clamped on CUDA. It does not limit images.
        causal: False lets every query see all keys from first_key on.
        scale: factor of the scores, from `2**-60` to `2**60`; by default 1 / sqrt(D).
        return_lse: also return lse.
        return_image_weights: also return the weights of the images, which the same pass computes.
        impl: "auto" (by device and length; on meta only shapes), "cpu", "triton", "flash+triton" (PyTorch's flash
            attention for the text, and a kernel that joins the images) or "reference". A named implementation never
            falls back to another, except that every call without queries (B or Tq is 0) runs "reference".

    Returns:
        out (B, Hq, Tq, D) in the dtype of q. With return_lse also lse (B, Hq, Tq), with return_image_weights also the
        weights (B, Hq, Tq, K), which are 0 where there is no image; both float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or impl cannot serve these tensors.

    Example:
        >>> q = torch.randn(2, 4, 6, 16)  # B Hq Tq D
        >>> k, v = torch.randn(2, 2, 2, 6, 16)  # each B Hkv Tk D
        >>> image_k, image_v = torch.randn(2, 2, 10, 16)  # each Hkv U D
        >>> image_index = torch.randint(10, (2, 6, 3))  # B Tq K
        >>> valm_kernels.visual_fusion_attn(q, k, v, image_k, image_v, image_index=image_index).shape
        torch.Size([2, 4, 6, 16])
    """
    check_bool("return_lse", return_lse)
    check_bool("return_image_weights", return_image_weights)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "image_k": image_k, "image_v": image_v, "image_q": image_q}
    given |= {"image_index": image_index, "image_mask": image_mask, "image_score_bias": image_score_bias}
    given |= {"image_k_bias": image_k_bias, "image_v_bias": image_v_bias, "image_logit_bias": image_logit_bias}
    given |= {"first_key": first_key, "cache_seqlens": cache_seqlens, "cu_seqlens": cu_seqlens}
    given |= {"causal": causal, "scale": scale, "softcap": softcap, "max_seqlen": max_seqlen}
    check_tensor("q", q)
    asked, impl = impl, _choose_impl(impl, q)
    inputs = _with_documents(checked_inputs(**_cast(given)))
    if impl == flash.NAME and (refusal := flash.refusal(inputs)) is not None:
        raise ValueError(f'impl="{impl}" {refusal}; use impl="auto"')
    if asked == "auto" and impl == "triton" and flash.is_faster(inputs):
        impl = flash.NAME
    if inputs.cu_seqlens is not None and impl != flash.NAME:
        inputs = inputs._replace(cu_seqlens=None, max_seqlen=None)  # other implementations read first_key
    if q.numel() == 0:
        impl = "reference"  # no kernel takes an empty tensor, and nothing is to be computed
    with outside_autocast(q.device.type):
        if impl == "reference":
            out, lse, image_weights = reference_attention(inputs)
        else:
            out, lse, image_scores = fused_attention(inputs, impl, return_image_weights)
            if return_image_weights:
                image_weights = _image_weights(image_scores, lse)
    if return_image_weights:
        return (out, lse, image_weights) if return_lse else (out, image_weights)
    return (out, lse) if return_lse else out


@survives_fork
def _image_weights(image_scores: Tensor, lse: Tensor) -> Tensor:
    # a query that sees nothing has lse and scores -inf, and weights 0
    return torch.exp(image_scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))


def attention_weights(
    q: Tensor,
    k: Tensor,
    image_k: Tensor | None,
    *,
    image_q: Tensor | None = None,
    softcap: float | None = None,
    image_index: Tensor | None = None,
    image_mask: Tensor | None = None,
    image_k_bias: Tensor | None = None,
    image_logit_bias: Tensor | None = None,
    image_score_bias: Tensor | None = None,
    first_key: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    text_bias: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The joint softmax of `visual_fusion_attn`, for plots and explanations: eager PyTorch on any device.

    If you need only the weights of images, `visual_fusion_attn(..., return_image_weights=True)` takes less time, and
    memory linear in the number of tokens.

    Args: as `visual_fusion_attn`, with any head dimension, and

        text_bias: (B or 1, Hq or 1, Tq, Tk) float, added to the text scores after scale and softcap, such as ALiBi;
            -inf hides a key. With causal=False it can express any mask.

    Returns:
        text_weights (B, Hq, Tq, Tk), image_weights (B, Hq, Tq, K) and lse (B, Hq, Tq), in float32 (float64 for float64
        inputs). All weights of a query sum to 1, or to 0 if the query sees nothing.

    Raises:
        TypeError, ValueError: as `visual_fusion_attn`.

    Example:
        >>> q, k, image_k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 3, 8)
        >>> text_weights, image_weights, lse = valm_kernels.attention_weights(q, k, image_k)
        >>> text_weights.shape, image_weights.shape
        (torch.Size([1, 2, 4, 4]), torch.Size([1, 2, 4, 3]))
    """
    # weights do not depend on values, so keys are passed in their place
    given: dict[str, Any] = {"q": q, "k": k, "v": k, "image_k": image_k, "image_v": image_k, "image_q": image_q}
    given |= {"image_index": image_index, "image_mask": image_mask, "image_score_bias": image_score_bias}
    given |= {"image_k_bias": image_k_bias, "image_logit_bias": image_logit_bias}
    given |= {"first_key": first_key, "cache_seqlens": cache_seqlens, "cu_seqlens": cu_seqlens}
    given |= {"causal": causal, "scale": scale, "softcap": softcap}
    check_tensor("q", q)
    inputs = _with_documents(checked_inputs(**_cast(given), any_dim=True))
    if text_bias is not None:
        check_text_bias(text_bias, inputs)
    with outside_autocast(q.device.type):
        return joint_softmax(inputs, text_bias)


def _cast(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments; under autocast, q, k, v, image_k, image_v and image_q are cast to its dtype.

    torch.library.register_autocast does not serve here: it knows one fixed dtype and would cast the float32 biases too.
    """
    q = given["q"]
    device_type = q.device.type
    if not is_autocast_enabled(device_type) or q.dtype == torch.float64:
        return given
    dtype = torch.get_autocast_dtype(device_type)
    return given | {name: given[name].to(dtype) for name in LIKE_Q if _is_cast(given[name])}


def _with_documents(inputs: Inputs) -> Inputs:
    """The inputs, whose first_key is the later of their own and the start of the document in cu_seqlens."""
    if inputs.cu_seqlens is None:
        return inputs
    batch, _, num_queries, _ = inputs.q.shape
    starts = document_starts(inputs.cu_seqlens, batch, num_queries, inputs.k.shape[2], inputs.max_seqlen)
    if inputs.first_key is None:
        return inputs._replace(first_key=starts)
    return inputs._replace(first_key=torch.maximum(inputs.first_key, starts), cu_seqlens=None, max_seqlen=None)


def _is_cast(tensor: Any) -> bool:
    """Whether autocast casts this tensor: not float64, as everywhere in PyTorch, nor what the checks reject."""
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64


def _choose_impl(impl: str, q: Tensor) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    device_type = q.device.type
    on_cuda = device_type == "cuda"
    if impl == "auto":
        if device_type in ("cpu", "meta"):  # on meta the operator computes shapes, whatever the implementation
            return "cpu"
        if not on_cuda:
            raise ValueError(
                f'impl="auto" serves CPU, CUDA and meta tensors, but q is on {q.device}; use impl="reference" there'
            )
        impl = "triton"
    if impl == "cpu" and device_type != "cpu":
        raise ValueError(f'impl="cpu" needs CPU tensors, but q is on {q.device}; use impl="auto"')
    if impl in ("triton", flash.NAME):
        if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f'impl="{impl}" needs CUDA tensors, but q is on {q.device}; use impl="auto". (Triton\'s interpreter '
                "takes CPU tensors, if TRITON_INTERPRET=1 is set before Python starts.)"
            )
        if not HAS_TRITON:
            raise ValueError(f'impl="{impl}" needs the package triton, which is not installed; use impl="reference"')
        if q.dtype == torch.float64:
            raise TypeError(f'impl="{impl}" does not take float64; use float32, or impl="reference"')
        if on_cuda and not torch.compiler.is_compiling() and (capability := _too_old(q.device)) is not None:
            raise ValueError(
                f'impl="{impl}" needs a GPU of compute capability 8.0 or newer (Ampere), but {q.device} has '
                f'{capability}; use impl="reference", or CPU tensors'
            )
        if on_cuda and not torch.compiler.is_compiling():
            _warn_of_new_gpu("NVIDIA" if torch.version.hip is None else "AMD")
    return impl


@cache
def _warn_of_new_gpu(vendor: str) -> None:
    """Warns once in a process, on NVIDIA GPUs until the results of gpu-check are in the package."""
    if torch.cuda.is_available() and not (vendor == "NVIDIA" and MEASURED_TILES.exists()):
        warnings.warn(
            f"the Triton kernels of visual_fusion_attn compile for {vendor} GPUs, but have never run on an {vendor} "
            'GPU: compare results with impl="reference"',
            stacklevel=4,
        )


@cache
def _too_old(device: torch.device) -> str | None:
    """The compute capability of an NVIDIA GPU that is too old for the kernels; None for other devices."""
    if not torch.cuda.is_available() or torch.version.hip is not None:  # a fake tensor, an AMD GPU
        return None
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= MIN_CAPABILITY else ".".join(map(str, capability))
