"""visual_fusion_attn on CPU: PyTorch's flash attention for the text, joined with the images by log-sum-exp.

A softmax over the union of two key sets is the mean of the softmaxes over each, weighted by their shares of the
joint sum: out = exp(lse_text - lse) out_text + sum_k exp(t_k - lse) v_k with lse = logaddexp(lse_text, lse_image).
The same holds for a text part cut into several calls of the flash kernel (`text_segments`).

Backward: with the joint lse the weight of every key is exp(score - lse), whichever part it belongs to, and with
the joint out the softmax's correction is delta = sum(grad_out * out) - grad_lse. So the flash backward, given the
joint out and lse, yields exactly the text's share of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from valm_kernels.visual_fusion.reference import check_image_index, text_visible

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# A run of queries with one first_key gets calls of its own from this length on; shorter runs share masked calls
# of at most MASKED_QUERIES queries.
MIN_RUN = 32
MASKED_QUERIES = 128


@dataclass(frozen=True)
class TextSegment:
    """One call of the flash kernel: these queries of these batch rows see these keys."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool = False  # top-left aligned, so only with as many keys as queries
    visible: Tensor | None = None  # (rows or 1, 1, queries, keys) bool, True = seen
    joins: bool = False  # its queries already have an earlier segment


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_k: Tensor | None,
    image_v: Tensor | None,
    image_index: Tensor | None,
    image_mask: Tensor | None,
    image_k_bias: Tensor | None,
    image_v_bias: Tensor | None,
    image_logit_bias: Tensor | None,
    first_key: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out and joint lse; arguments as in visual_fusion_attn, already checked but for the values of image_index."""
    if image_index is not None:
        check_image_index(image_index, image_k.shape[1])
    q, k, v = (_unit_last_stride(t) for t in (q, k, v))
    out, lse = _text_forward(q, k, v, first_key, causal, scale)
    if image_k is None:
        return out, lse

    scores, _, values, _ = _image_scores(
        q, image_k, image_v, image_index, image_mask, image_k_bias, image_v_bias, image_logit_bias, scale
    )
    joint = torch.logaddexp(lse, scores.logsumexp(-1))
    base = joint.masked_fill(joint == -torch.inf, 0)  # a query that sees nothing: every exp below is 0
    weights = torch.exp(scores - base.unsqueeze(-1))
    grouped = weights.unflatten(1, (values.shape[1], -1))  # (B, Hkv, G, Tq, K)
    image_out = torch.einsum("bhgtk,bhtkd->bhgtd", grouped, values).flatten(1, 2)
    joined = out * torch.exp(lse - base).unsqueeze(-1) + image_out
    return out.copy_(joined), joint


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_k: Tensor | None,
    image_v: Tensor | None,
    image_index: Tensor | None,
    image_mask: Tensor | None,
    image_k_bias: Tensor | None,
    image_v_bias: Tensor | None,
    image_logit_bias: Tensor | None,
    first_key: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, image_k, image_v, image_k_bias, image_v_bias and image_logit_bias; None where absent."""
    grad_out, out, q, k, v = (_unit_last_stride(t) for t in (grad_out, out, q, k, v))
    # exp(score - lse) has to be 0, not NaN, where a query sees nothing.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    grad_q, grad_k, grad_v = _text_backward(grad_out, grad_lse, out, lse, q, k, v, first_key, causal, scale)
    if image_k is None:
        return grad_q, grad_k, grad_v, None, None, None, None, None

    scores, keys, values, slots = _image_scores(
        q, image_k, image_v, image_index, image_mask, image_k_bias, image_v_bias, image_logit_bias, scale
    )
    kv_heads = keys.shape[1]
    weights = torch.exp(scores - lse.unsqueeze(-1)).unflatten(1, (kv_heads, -1))  # (B, Hkv, G, Tq, K)
    wide_q = q.to(lse.dtype).unflatten(1, (kv_heads, -1))
    wide_grad = grad_out.to(lse.dtype).unflatten(1, (kv_heads, -1))
    delta = (grad_out.to(lse.dtype) * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_weights = torch.einsum("bhgtd,bhtkd->bhgtk", wide_grad, values)
    grad_scores = weights * (grad_weights - delta.unflatten(1, (kv_heads, -1)).unsqueeze(-1))
    grad_q += scale * torch.einsum("bhgtk,bhtkd->bhgtd", grad_scores, keys).flatten(1, 2)
    grad_keys = scale * torch.einsum("bhgtk,bhgtd->bhtkd", grad_scores, wide_q)
    grad_values = torch.einsum("bhgtk,bhgtd->bhtkd", weights, wide_grad)

    def of_bias(bias: Tensor | None, gradient: Tensor) -> Tensor | None:
        return None if bias is None else gradient.to(bias.dtype)

    grad_k_bias = of_bias(image_k_bias, grad_keys.sum((0, 2, 3)))
    grad_v_bias = of_bias(image_v_bias, grad_values.sum((0, 2, 3)))
    grad_logit_bias = of_bias(image_logit_bias, grad_scores.sum((0, 3, 4)).flatten())
    if slots is not None:
        grad_keys = _pool_gradient(grad_keys, slots, image_k)
        grad_values = _pool_gradient(grad_values, slots, image_v)
    return (
        grad_q,
        grad_k,
        grad_v,
        torch.empty_like(image_k).copy_(grad_keys),
        torch.empty_like(image_v).copy_(grad_values),
        grad_k_bias,
        grad_v_bias,
        grad_logit_bias,
    )


def _image_scores(
    q: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    image_index: Tensor | None,
    image_mask: Tensor | None,
    image_k_bias: Tensor | None,
    image_v_bias: Tensor | None,
    image_logit_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Scores (B, Hq, Tq, K), keys and values (B, Hkv, Tq, K, D) with their biases, pool rows (B, Tq, K) or None."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    slots, present = None, image_mask
    if image_index is not None:
        present = image_index >= 0
        slots = torch.where(present, image_index, image_k.shape[1]).long()
        image_k, image_v = (
            torch.nn.functional.pad(t, (0, 0, 0, 1))[:, slots].transpose(0, 1) for t in (image_k, image_v)
        )
    keys, values = image_k.to(dtype), image_v.to(dtype)
    if image_k_bias is not None:
        keys = keys + image_k_bias[:, None, None]
    if image_v_bias is not None:
        values = values + image_v_bias[:, None, None]
    grouped = q.to(dtype).unflatten(1, (keys.shape[1], -1))
    scores = scale * torch.einsum("bhgtd,bhtkd->bhgtk", grouped, keys).flatten(1, 2)
    if image_logit_bias is not None:
        scores = scores + image_logit_bias[:, None, None]
    if present is not None:
        scores = scores.masked_fill(~present[:, None], -torch.inf)
    return scores, keys, values, slots


def _pool_gradient(gradient: Tensor, slots: Tensor, pool: Tensor) -> Tensor:
    """Sums the gradients (B, Hkv, Tq, K, D) of all slots that read one pool row into (Hkv, U, D)."""
    heads, rows, dim = pool.shape
    total = gradient.new_zeros(heads, rows + 1, dim)
    total.index_add_(1, slots.flatten(), gradient.transpose(0, 1).flatten(1, 3))
    return total[:, :rows]


def text_segments(
    batch: int, num_queries: int, num_keys: int, first_key: Tensor | None, causal: bool
) -> Iterator[TextSegment]:
    """Cuts the visible (query, key) pairs of the text into calls of the flash kernel.

    Queries in a row with the same first_key (a document, all after a left padding) see a rectangle and a causal
    square, which need no mask. Only where first_key changes from query to query (sliding windows, anything
    irregular) is a mask used, over blocks of queries and just the keys that they can see.
    """
    everything = slice(0, batch)
    if first_key is None:
        yield from _run_segments(everything, 0, num_queries, 0, num_queries, num_keys, causal)
        return
    first_key = first_key.clamp(0, num_keys)
    row_starts = _change_points((first_key[1:] != first_key[:-1]).any(-1), batch)
    for row, row_end in pairwise(row_starts):
        rows = slice(row, row_end)
        firsts = first_key[row]
        runs = _change_points(firsts[1:] != firsts[:-1], num_queries)
        at = 0
        while at < len(runs) - 1:
            last = at + 1
            if runs[last] - runs[at] < MIN_RUN:
                while last < len(runs) - 1 and runs[last + 1] - runs[last] < MIN_RUN:
                    if runs[last + 1] - runs[at] > MASKED_QUERIES:
                        break
                    last += 1
            start, stop = runs[at], runs[last]
            if last == at + 1:
                first = int(firsts[start])
                yield from _run_segments(rows, start, stop, first, num_queries, num_keys, causal)
            else:
                keys = slice(int(firsts[start:stop].min()), stop + num_keys - num_queries if causal else num_keys)
                if keys.start < keys.stop:
                    visible = text_visible(num_queries, num_keys, first_key[row : row + 1], causal, firsts.device)
                    yield TextSegment(rows, slice(start, stop), keys, visible=visible[:, :, start:stop, keys])
            at = last


def _change_points(changed: Tensor, length: int) -> list[int]:
    return [0, *(changed.nonzero().flatten() + 1).tolist(), length]


def _run_segments(
    rows: slice, start: int, stop: int, first: int, num_queries: int, num_keys: int, causal: bool
) -> Iterator[TextSegment]:
    """The segments of queries start..stop, which all see the keys from `first` on."""
    prefix = num_keys - num_queries
    if not causal:
        if first < num_keys:
            yield TextSegment(rows, slice(start, stop), slice(first, num_keys))
        return
    start = max(start, first - prefix)  # the queries before it see nothing
    queries = slice(start, stop)
    if stop - start == 1:
        yield TextSegment(rows, queries, slice(first, stop + prefix))
    elif stop > start:
        rectangle = first < start + prefix
        if rectangle:
            yield TextSegment(rows, queries, slice(first, start + prefix))
        yield TextSegment(rows, queries, slice(start + prefix, stop + prefix), causal=True, joins=rectangle)


def _text_forward(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    segments = list(text_segments(q.shape[0], q.shape[2], k.shape[2], first_key, causal))
    if len(segments) == 1 and _covers(segments[0], q):
        segment = segments[0]
        out, lse = _flash(q, k[:, :, segment.keys], v[:, :, segment.keys], 0.0, segment.causal, scale=scale)
        return out, lse.contiguous()
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for segment in segments:
        at = (segment.rows, slice(None), segment.queries)
        keys = (segment.rows, slice(None), segment.keys)
        part, part_lse = _flash(
            q[at], k[keys], v[keys], 0.0, segment.causal, attn_mask=_additive(segment.visible, q), scale=scale
        )
        if segment.visible is not None:  # the kernel reports lse 0 for a query that sees nothing
            part_lse = part_lse.masked_fill(~segment.visible.any(-1), -torch.inf)
        if segment.joins:
            joint = torch.logaddexp(lse[at], part_lse)
            earlier = torch.exp(lse[at] - joint).unsqueeze(-1) * out[at]
            part = earlier + torch.exp(part_lse - joint).unsqueeze(-1) * part
            part_lse = joint
        out[at] = part
        lse[at] = part_lse
    return out, lse


def _text_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = q.shape[-1]
    if grad_lse is not None:
        # The kernel has no gradient of lse, but computes delta = sum(grad_out * out): a column that holds -1 in
        # out and grad_lse in grad_out makes it sum(grad_out * out) - grad_lse. Zeros in q, k and v keep that
        # column out of everything else; eight of them keep the rows aligned.
        grad_out, out, q, k, v = (torch.nn.functional.pad(t, (0, 8)) for t in (grad_out, out, q, k, v))
        out[..., head_dim] = -1
        grad_out[..., head_dim] = grad_lse
    segments = list(text_segments(q.shape[0], q.shape[2], k.shape[2], first_key, causal))
    if len(segments) == 1 and _covers(segments[0], q) and segments[0].keys == slice(0, k.shape[2]):
        gradients = _flash_backward(grad_out, q, k, v, out, lse, 0.0, segments[0].causal, scale=scale)
    else:
        # Overlapping segments add up in lse's precision.
        gradients = [t.new_zeros(t.transpose(1, 2).shape, dtype=lse.dtype).transpose(1, 2) for t in (q, k, v)]
        for segment in segments:
            at = (segment.rows, slice(None), segment.queries)
            keys = (segment.rows, slice(None), segment.keys)
            parts = _flash_backward(
                grad_out[at],
                q[at],
                k[keys],
                v[keys],
                out[at],
                lse[at],
                0.0,
                segment.causal,
                attn_mask=_additive(segment.visible, q),
                scale=scale,
            )
            for gradient, part, where in zip(gradients, parts, (at, keys, keys), strict=True):
                gradient[where] += part
        gradients = [g.to(q.dtype) for g in gradients]
    if grad_lse is not None:
        gradients = [g[..., :head_dim].transpose(1, 2).contiguous().transpose(1, 2) for g in gradients]
    return tuple(gradients)


def _covers(segment: TextSegment, q: Tensor) -> bool:
    return segment.visible is None and segment.rows == slice(0, q.shape[0]) and segment.queries == slice(0, q.shape[2])


def _additive(visible: Tensor | None, q: Tensor) -> Tensor | None:
    """The kernel's mask: it refuses booleans, and takes 2 or 4 dimensions only."""
    return None if visible is None else q.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)


def _unit_last_stride(tensor: Tensor) -> Tensor:
    """The flash kernel reads a last dimension of any other stride wrongly."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
