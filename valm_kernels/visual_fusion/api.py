"""The public functions visual_fusion_attn and attention_weights: autocast and the choice of an implementation."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from ..native import survives_fork
from . import flash
from .autocast import is_autocast_enabled, outside_autocast
from .checks import check_bool, check_tensor, check_text_bias, checked_inputs
from .inputs import Inputs
from .op import document_starts, fused_attention
from .reference import joint_softmax, reference_attention

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in `typing` from Python 3.11 on

IMPLS = ("auto", "triton", flash.NAME, "cpu", "reference")
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Of the tensor cores that take bfloat16, and of asynchronous copies to shared memory.
MIN_CAPABILITY = (8, 0)


class PackedOptions(TypedDict, total=False):
    """The keyword arguments of `visual_fusion_attn_varlen` but those that decide what it returns."""

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
    image_slots: Tensor | None
    scale: float | None
    impl: str


class Options(PackedOptions, total=False):
    """Those of `visual_fusion_attn`."""

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
    image_slots: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    return_image_weights: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Attention of every token over its text and its own K images, with one softmax over both.

    For query i of head h, its text keys j and its images k (equations 3 to 7 of Wang et al., "Visually-Augmented
    Language Modeling", with several heads, a prefix, first_key and the two biases of scores added):

        s_ij = scale * q_i . k_j                            first_key_i <= j <= i + (Tk - Tq)
        t_ik = scale * u_i . (image_k_ik + image_k_bias) + image_logit_bias_h + image_score_bias_ik
        [a_i | b_i] = softmax([s_i | t_i])
        out_i = sum_j a_ij v_j + sum_k b_ik (image_v_ik + image_v_bias)
        lse_i = log(sum_j exp s_ij + sum_k exp t_ik)

    u_i is image_q_i, or q_i without it. With softcap c the s_ij, and the products in t_ik before the two biases of
    scores are added, become c tanh(. / c).
    A query that sees neither text nor image gets zeros, lse -inf and zero gradient.

    Args:
        q: (B, Hq, Tq, D) float32, float16 or bfloat16 (float64 too for "cpu" and "reference"), 8 <= D <= 256.
            Any strides.
        k, v: (B, Hkv, Tk, D), dtype of q. Tk >= Tq (the first Tk - Tq keys are a prefix, e.g. a cache); Hq is a
            multiple of Hkv (grouped-query attention).
        image_k, image_v: keys and values of the images, dtype of q. Dense layout (B, Hkv, Tq, K, D), or pooled
            layout (Hkv, U, D) together with image_index. 0 <= K <= 64. Both None means no images.
        image_q: (B, Hq, Tq, D), dtype of q: the query for the images; by default q. In a rotary model pass the query
            before rotation, so that every image is at its token's own position. The gradient of q then comes from the
            text alone.
        softcap: cap of the scores as in Gemma 2, from 2**-60 to 2**60; None means no cap.
        image_index: (B, Tq, K) int32 or int64 rows of the pool; -1 = no image. Selects the pooled layout. With
            (B, Hkv, Tq, K) each key head has images of its own: head h those rows of image_k[h] and image_v[h].
            On CPU an index outside [-1, U) raises. On CUDA it is undefined behaviour, unless the environment has
            VALM_KERNELS_CHECK_INDEX=1: then every call checks the indices, which waits for the device.
        image_mask: (B, Tq, K) bool, dense layout only; False = no image.
        image_k_bias, image_v_bias: (Hkv, D) added to every image's key / value; dtype of q or float32.
        image_logit_bias: (Hq,) float32 added to every image score of a head (float64 beside a float64 q).
        image_score_bias: (B, Tq, K) float32 added to the score of each image in all heads (float64 beside a float64
            q): a prior, such as the retrieval score. Differentiable. -inf gives an image the weight 0; a large negative
            number does not do instead, as the float32 lse of a query that sees nothing else cannot tell such scores
            apart. A slot without an image remains without, whatever its bias, NaN too.
        first_key: (B, Tq) int32, the first text key that each query sees: left padding, packed documents and
            sliding windows. It need not be monotone; values <= 0 mean all keys. It limits text only: mask the
            images of a padding query by image_index or image_mask.
        cu_seqlens: (N + 1,) int32 or int64: the B rows, concatenated, are N documents, and document n is the
            keys from cu_seqlens[n] to cu_seqlens[n + 1] - 1 of these B Tk, as in flash-attention. It rises from 0 to
            B Tk, has the bound of each row, and may repeat a number (an empty document); on CPU anything else raises,
            on CUDA it is undefined behaviour, as for image_index. A query sees only text of its own document; with
            first_key as well, the later of the two limits counts. Every call computes first_key from it, so a model of
            many layers saves time by doing that once. It needs causal=True and no cache_seqlens.
        cache_seqlens: (B,) int32, how many keys of each row there are, those of this call included: takes the place of
            Tk in j <= i + (Tk - Tq), for a cache of constant size Tk that is being filled (StaticCache, CUDA graphs).
            The keys and values from there on are not used and may be anything, NaN too. 0 to Tk, fewer than Tq too:
            on CPU anything else raises, on CUDA it counts as the nearest of these. It limits text only.
        max_seqlen: the longest document of cu_seqlens has at most as many tokens, Tk by default: "flash+triton" then
            starts fewer programs. On CPU a longer document raises, on CUDA it is undefined behaviour.
        image_slots: (U + 1 + B Tq K,) int32, `sort_image_slots(image_index, U)` (with a row for each key head where
            image_index has one). It changes nothing: the backward of the pooled layout on CUDA sorts image_index
            itself until a card has shown that this costs time. On CPU it raises if it belongs to another image_index.
        causal: False lets every query see all keys from first_key on.
        scale: factor of the scores, from 2**-60 to 2**60; 1 / sqrt(D) by default.
        return_lse: return (out, lse) instead of out.
        return_image_weights: return the weights b_ik of the images as well, after the other results. Without a second
            pass over the text: the same kernel writes the scores t_ik, and the weights are exp(t_ik - lse_i).
        impl: "auto" takes "cpu" for CPU tensors. For CUDA tensors it takes "flash+triton" (PyTorch's flash attention
            for the text, and one kernel that joins the images) if there are no images, or several queries and a long
            text, else "triton". Long is Tk D >= 2048 * 128, an estimate, until `make gpu-check` has measured it on such
            a card; of documents in cu_seqlens their mean length counts.
            "flash+triton" needs float16 or bfloat16, D a multiple of 8, as many queries as keys (if causal or with
            cu_seqlens; a single query is causal with any keys), and none of first_key, cache_seqlens and softcap;
            "auto" takes "triton" where that is not so. Its backward is that of "triton" where lse or the weights of the
            images have a gradient, or with `torch.use_deterministic_algorithms(True)`. A named implementation never
            falls back to another one.
            Under TRITON_INTERPRET=1 both Triton implementations take CPU tensors; bfloat16 is wrong there, as Triton's
            interpreter multiplies its bits.

    Returns:
        out (B, Hq, Tq, D) in the dtype of q; with return_lse also lse (B, Hq, Tq), with return_image_weights also the
        weights (B, Hq, Tq, K), both float32 (float64 for float64 inputs). A weight is 0 where there is no image. All
        are differentiable once, by autograd or torch.func (grad, vjp, jacrev, also with vmap): second derivatives and
        forward mode (jvp, jacfwd, hessian) raise, except in impl="reference".
        Under torch.autocast q, k, v, image_k, image_v and image_q are cast to the autocast dtype first.
        In 16 bits the gradients of image_k_bias and image_logit_bias are rounded more than the other ones, because the
        backward starts from the rounded out, as in all flash attention (tests/README.md has the numbers). Where
        images have nearly all of a query's weight, "cpu" undoes this; with the two Triton implementations the gradients
        of image_k, image_q and image_score_bias, nearly 0 there, are rounded more too, and that of q without image_q.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or impl cannot serve these tensors.
    """
    check_bool("return_lse", return_lse)
    check_bool("return_image_weights", return_image_weights)
    images = (image_k, image_v, image_q, image_index, image_mask)
    biases = (image_k_bias, image_v_bias, image_logit_bias, image_score_bias)
    tensors = (q, k, v, *images, *biases, first_key, cache_seqlens, image_slots, cu_seqlens)
    check_tensor("q", q)
    asked, impl = impl, _choose_impl(impl, q)
    inputs = _with_documents(checked_inputs(_cast(tensors), causal, scale, softcap, max_seqlen))
    if impl == flash.NAME and (refusal := flash.refusal(inputs)) is not None:
        raise ValueError(f'impl="{impl}" {refusal}; use impl="auto"')
    if asked == "auto" and impl == "triton" and flash.is_faster(inputs):
        impl = flash.NAME
    if inputs.cu_seqlens is not None and impl != flash.NAME:
        inputs = inputs._replace(cu_seqlens=None, max_seqlen=None)  # the others read first_key
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
    # where nothing is seen lse is -inf, as are the scores, and the weights are 0
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
    """The joint softmax of `visual_fusion_attn` itself, for plots and explanations: eager PyTorch on any device.

    For the weights of images alone `visual_fusion_attn(..., return_image_weights=True)` takes less time, and memory
    linear in the number of tokens.

    Args: as in `visual_fusion_attn`, with any head dimension, and

        text_bias: (B or 1, Hq or 1, Tq, Tk) float, added to the scores of text after scale and softcap; -inf hides a
            key. So positions can have a bias (ALiBi), and with causal=False any mask will do.

    Returns:
        text_weights (B, Hq, Tq, Tk), image_weights (B, Hq, Tq, K) and lse (B, Hq, Tq), in float32 (float64 for float64
        inputs). The two weights of a query sum to 1 together, or to 0 where the query sees nothing.

    Raises:
        TypeError, ValueError: as `visual_fusion_attn`.
    """
    # the weights do not depend on the values, so the keys stand in for them
    images = (image_k, image_k, image_q, image_index, image_mask)
    biases = (image_k_bias, None, image_logit_bias, image_score_bias)
    tensors = (q, k, k, *images, *biases, first_key, cache_seqlens, None, cu_seqlens)
    check_tensor("q", q)
    inputs = _with_documents(checked_inputs(_cast(tensors), causal, scale, softcap, any_dim=True))
    if text_bias is not None:
        check_text_bias(text_bias, inputs)
    with outside_autocast(q.device.type):
        return joint_softmax(inputs, text_bias)


def _cast(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Under autocast q, k, v, image_k, image_v and image_q in its dtype.

    Applied here, for all implementations: torch.library.register_autocast knows one fixed dtype and would cast the
    float32 biases too.
    """
    q = tensors[0]
    device_type = q.device.type
    if not is_autocast_enabled(device_type) or q.dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return (*(t.to(dtype) if _is_cast(t) else t for t in tensors[:6]), *tensors[6:])


def _with_documents(inputs: Inputs) -> Inputs:
    """The inputs with the first_key of the documents in cu_seqlens, or the inputs' own where that is later."""
    if inputs.cu_seqlens is None:
        return inputs
    batch, _, num_queries, _ = inputs.q.shape
    starts = document_starts(inputs.cu_seqlens, batch, num_queries, inputs.k.shape[2], inputs.max_seqlen)
    if inputs.first_key is None:
        return inputs._replace(first_key=starts)
    return inputs._replace(first_key=torch.maximum(inputs.first_key, starts), cu_seqlens=None, max_seqlen=None)


def _is_cast(tensor: Any) -> bool:
    """Whether autocast casts it: not float64, as everywhere in PyTorch, nor what the checks reject."""
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64


def _choose_impl(impl: str, q: Tensor) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    device_type = q.device.type
    on_cuda = device_type == "cuda"
    if impl == "auto":
        if device_type not in ("cpu", "cuda"):
            raise ValueError(
                f'impl="auto" serves CPU and CUDA tensors, but q is on {q.device}; use impl="reference" there'
            )
        impl = "triton" if on_cuda else "cpu"
    if impl == "cpu" and device_type != "cpu":
        raise ValueError(f'impl="cpu" needs CPU tensors, but q is on {q.device}; use impl="auto"')
    if impl in ("triton", flash.NAME):
        if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f'impl="{impl}" needs CUDA tensors, but q is on {q.device}; use impl="auto" (CPU tensors are '
                "served only by Triton's interpreter, with TRITON_INTERPRET=1 set before Python starts)"
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
        if on_cuda and torch.version.hip is not None and not torch.compiler.is_compiling():
            _warn_of_amd()
    return impl


@cache
def _warn_of_amd() -> None:
    """Once in a process."""
    warnings.warn(
        "the Triton kernels of visual_fusion_attn were compiled for AMD GPUs, but have never run on one: compare with "
        'impl="reference"',
        stacklevel=4,
    )


@cache
def _too_old(device: torch.device) -> str | None:
    """The compute capability of an NVIDIA GPU that the kernels do not serve; None of others."""
    if not torch.cuda.is_available() or torch.version.hip is not None:  # a fake tensor, an AMD GPU
        return None
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= MIN_CAPABILITY else ".".join(map(str, capability))
