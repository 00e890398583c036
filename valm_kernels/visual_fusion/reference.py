"""The executable specification of visual_fusion_attn: eager PyTorch in the dtype of its inputs.

Tests compare every other implementation with it in float64. In 16 bits it rounds scores and weights like eager
attention, and its error bounds the error that other implementations may have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_cache_seqlens, check_pool
from .inputs import Inputs


def joint_softmax(inputs: Inputs, text_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of text (B, Hq, Tq, Tk) and images (B, Hq, Tq, K), and lse (B, Hq, Tq); float32 or wider.

    All weights of a query sum to 1, or to 0 if the query sees nothing. text_bias is as in `attention_weights`.
    """
    q, k, image_k = inputs.q, _used(inputs.k, inputs.cache_seqlens), inputs.image_k
    num_queries, num_keys = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]

    wide = torch.promote_types(q.dtype, torch.float32)
    scores = inputs.scale * (q @ k.repeat_interleave(group, 1).transpose(-1, -2)).to(wide)  # (B, Hq, Tq, Tk)
    scores = _capped(scores, inputs.softcap)
    if text_bias is not None:
        scores = scores + text_bias.to(wide)
    visible = text_visible(num_queries, num_keys, inputs.first_key, inputs.cache_seqlens, inputs.causal, q.device)
    scores = scores.masked_fill(~visible, -torch.inf)
    if image_k is not None:
        check_pool(inputs)
        image_q = q if inputs.image_q is None else inputs.image_q
        images, present = _images(image_k, inputs.image_index, inputs.image_mask)
        if inputs.image_k_bias is not None:
            images = images + inputs.image_k_bias[:, None, None].to(images.dtype)
        images = images.repeat_interleave(group, 1)  # (B, Hq, Tq, K, D)
        image_scores = inputs.scale * (images @ image_q.unsqueeze(-1)).squeeze(-1).to(wide)  # (B, Hq, Tq, K)
        image_scores = _capped(image_scores, inputs.softcap)
        if inputs.image_logit_bias is not None:
            image_scores = image_scores + inputs.image_logit_bias[:, None, None]
        if inputs.image_score_bias is not None:
            image_scores = image_scores + inputs.image_score_bias[:, None]
        if present is not None:
            if present.shape[1] > 1:
                present = present.repeat_interleave(group, 1)
            image_scores = image_scores.masked_fill(~present, -torch.inf)
        scores = torch.cat([scores, image_scores], -1)  # (B, Hq, Tq, Tk + K)

    # A query that sees nothing has only -inf scores: its weights are 0 and carry no gradient.
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    lse = scores.masked_fill(empty, 0).logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - lse).masked_fill(empty, 0)
    lse = lse.masked_fill(empty, -torch.inf).squeeze(-1)
    return weights[..., :num_keys], weights[..., num_keys:], lse


def reference_attention(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, Hq, Tq, D), lse (B, Hq, Tq) and the image weights (B, Hq, Tq, K), with gradients by autograd."""
    text_weights, image_weights, lse = joint_softmax(inputs)
    q, v, image_v = inputs.q, _used(inputs.v, inputs.cache_seqlens), inputs.image_v
    group = q.shape[1] // v.shape[1]
    out = text_weights.to(q.dtype) @ v.repeat_interleave(group, 1)  # (B, Hq, Tq, D)
    if image_v is not None:
        images, _ = _images(image_v, inputs.image_index, inputs.image_mask)
        if inputs.image_v_bias is not None:
            images = images + inputs.image_v_bias[:, None, None].to(images.dtype)
        images = images.repeat_interleave(group, 1)  # (B, Hq, Tq, K, D)
        out = out + (image_weights.to(q.dtype).unsqueeze(-2) @ images).squeeze(-2)
    return out, lse, image_weights


def text_visible(
    num_queries: int,
    num_keys: int,
    first_key: Tensor | None,
    cache_seqlens: Tensor | None,
    causal: bool,
    device: torch.device,
) -> Tensor:
    """(B or 1, 1, Tq, Tk) bool: which text keys each query sees."""
    key = torch.arange(num_keys, device=device)
    query = torch.arange(num_queries, device=device)[:, None]
    lengths = torch.tensor([num_keys], device=device) if cache_seqlens is None else cache_seqlens
    end = lengths[:, None, None, None]  # (B or 1, 1, 1, 1)
    if causal:
        end = end + (query + 1 - num_queries)  # (B or 1, 1, Tq, 1)
    visible = (key < end).expand(-1, -1, num_queries, -1)
    if first_key is not None:
        visible = visible & (key >= first_key[:, None, :, None])
    return visible


def _used(text: Tensor, cache_seqlens: Tensor | None) -> Tensor:
    """The keys or values (B, Hkv, Tk, D), with zeros from cache_seqlens on."""
    if cache_seqlens is None:
        return text
    check_cache_seqlens(cache_seqlens, text.shape[2])
    unused = torch.arange(text.shape[2], device=text.device) >= cache_seqlens[:, None]  # (B, Tk)
    return text.masked_fill(unused[:, None, :, None], 0)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _images(image: Tensor, image_index: Tensor | None, image_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The images of every query, (B, Hkv, Tq, K, D), and flags of those present, (B, 1 or Hkv, Tq, K) or None: all."""
    if image_index is None:
        if image_mask is None:
            return image, None
        present = image_mask[:, None]
        return image.masked_fill(~present.unsqueeze(-1), 0), present  # masked images may hold anything, even NaN
    padded = torch.nn.functional.pad(image, (0, 0, 0, 1))  # (Hkv, U + 1, D): index -1 reads the zero row
    index = image_index.long() if image_index.dim() == 4 else image_index.long()[:, None]  # (B, 1 or Hkv, Tq, K)
    head = torch.arange(len(image), device=image.device)[:, None, None]
    return padded[head, index], index >= 0
