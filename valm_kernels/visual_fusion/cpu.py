"""visual_fusion_attn on CPU: PyTorch's flash attention for the text, joined with the images by log-sum-exp.

A softmax over two sets of keys is the mean of the softmaxes over each set, weighted by its share of the joint sum:
out = exp(lse_text - lse) out_text + sum_k exp(t_k - lse) v_k with lse = logaddexp(lse_text, lse_image).
If the text takes several calls of the flash kernel (`text_segments`), they are joined in this way too.

Backward: with the joint lse the weight of every key, text or image, is exp(score - lse). With the joint out the
softmax's correction is delta = sum(grad_out * out) - grad_lse. So the flash backward, called with the joint out and
lse, returns exactly the text's share of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..native import cpu_isa, native, survives_fork
from . import cpu_softcap
from .checks import check_cache_seqlens, check_pool
from .inputs import Gradients, Inputs
from .layout import empty_rows_like, empty_tokens_first, whole_rows

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# A run of at least MIN_RUN queries with one first_key gets its own calls. Shorter runs share masked calls of at most
# MASKED_QUERIES queries. Forward + backward of the text (B1 H12 T1024 D64 float32, one thread of an AVX-512 server):
# documents of 16 tokens take 16 ms as runs and 20 ms masked, of 8 tokens 22 and 19 ms. A window of 64 tokens takes 31,
# 32, 38 and 54 ms in masked calls of 32, 64, 128 and 256 queries. One document takes 113 ms.
MIN_RUN = 16
MASKED_QUERIES = 64


@dataclass(frozen=True)
class TextSegment:
    """One call of the flash kernel: these queries of these batch rows see these keys."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool = False  # top-left aligned, so only with as many keys as queries
    visible: Tensor | None = None  # (rows or 1, 1, queries, keys) bool, True = seen
    joins: bool = False  # its queries already have an earlier segment


@survives_fork
def forward(inputs: Inputs, image_scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Tq, D) and the joint lse (B, Hq, Tq); writes image_scores (B, Hq, Tq, K)."""
    inputs = _whole_rows(inputs)
    out, lse = _text_forward(inputs)
    if inputs.image_k is not None:
        _ImageBranch(inputs).run("forward", out=out, lse=lse, image_scores=image_scores)
    return out, lse


@survives_fork
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_image_scores: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    needed: Sequence[bool],
) -> Gradients:
    """The needed gradients, in the order of `Gradients`.

    Gradients of the text are computed if q, k or v needs one, gradients of images if image_k or image_v does, and all
    others always, because they share their work.
    """
    grad_out, out, inputs = whole_rows(grad_out), whole_rows(out), _whole_rows(inputs)
    # If a query sees nothing, exp(score - lse) must be 0, and the gradient of lse may be anything.
    unseen = lse == -torch.inf
    lse = lse.masked_fill(unseen, torch.inf)
    grad_lse = None if grad_lse is None else grad_lse.masked_fill(unseen, 0)
    grad_k, grad_v = None, None
    if any(needed[:3]):
        grad_q, grad_k, grad_v = _text_backward(grad_out, grad_lse, out, lse, inputs)
    else:  # a frozen model, of which only the layers that make image keys and values learn
        grad_q = empty_tokens_first(inputs.q).zero_()
    if inputs.image_k is None or inputs.image_v is None:
        return _only(needed, grad_q, grad_k, grad_v, *[None] * 7)

    biases = (inputs.image_k_bias, inputs.image_v_bias, inputs.image_logit_bias)
    image_gradients: list[Tensor | None] = [None, None]
    if any(needed[3:5]):
        image_gradients = [empty_rows_like(t) for t in (inputs.image_k, inputs.image_v)]
    grad_image_q = None if inputs.image_q is None else empty_tokens_first(inputs.image_q).zero_()
    bias_gradients = [None if b is None else lse.new_empty(b.shape) for b in biases]
    score_bias = inputs.image_score_bias
    grad_score_bias = None if score_bias is None else score_bias.new_zeros(score_bias.shape)
    _ImageBranch(inputs).run(
        "backward",
        out=out,
        lse=lse,
        grad_out=grad_out,
        grad_lse=grad_lse,
        grad_image_scores=None if grad_image_scores is None else grad_image_scores.contiguous(),
        grad_q=grad_q if grad_image_q is None else grad_image_q,
        grad_image_k=image_gradients[0],
        grad_image_v=image_gradients[1],
        grad_image_k_bias=bias_gradients[0],
        grad_image_v_bias=bias_gradients[1],
        grad_image_logit_bias=bias_gradients[2],
        grad_image_score_bias=grad_score_bias,
    )
    of_biases = zip(biases, bias_gradients, strict=True)
    bias_gradients = [None if b is None or g is None else g.to(b.dtype) for b, g in of_biases]
    return _only(needed, grad_q, grad_k, grad_v, *image_gradients, grad_image_q, *bias_gradients, grad_score_bias)


def _only(needed: Sequence[bool], *gradients: Tensor | None) -> Gradients:
    return Gradients._make(g if is_needed else None for g, is_needed in zip(gradients, needed, strict=True))


def _whole_rows(inputs: Inputs) -> Inputs:
    """The inputs with contiguous rows of q, k and v, as the flash kernel and the image branch read them."""
    q = whole_rows(inputs.q)
    # out is laid out like q: if the rows of q overlap, out would have no contiguous rows
    if torch.empty_like(q, device="meta").stride(-1) != 1:
        q = q.contiguous()
    return inputs._replace(q=q, k=whole_rows(inputs.k), v=whole_rows(inputs.v))


class _ImageBranch:
    """The native image branch, with its inputs in the form of csrc/image_attn/image_attn.hpp."""

    def __init__(self, inputs: Inputs) -> None:
        image_k, image_v, image_q, image_index, image_mask = inputs[3:8]
        assert image_k is not None and image_v is not None
        q = inputs.q if image_q is None else whole_rows(image_q)
        self.scale = inputs.scale
        self.softcap = 0.0 if inputs.softcap is None else inputs.softcap
        if image_index is None:
            kv_heads, num_images, pool_rows = image_k.shape[1], image_k.shape[3], -1
        else:
            kv_heads, num_images, pool_rows = image_k.shape[0], image_index.shape[-1], image_k.shape[1]
            check_pool(inputs)
            image_index = image_index.int().contiguous()
            if not inputs.by_head:  # a stride of 0
                image_index = image_index[:, None].expand(-1, kv_heads, -1, -1)
        batch, query_heads, num_queries, head_dim = q.shape
        self.dtype = str(q.dtype).removeprefix("torch.")
        self.sizes = (batch, query_heads, kv_heads, num_queries, num_images, head_dim, pool_rows)
        wide = torch.promote_types(q.dtype, torch.float32)
        self.inputs = {
            "q": q,
            "image_k": whole_rows(image_k),
            "image_v": whole_rows(image_v),
            "image_index": image_index,
            "image_mask": None if image_mask is None else image_mask.contiguous(),
        }
        for name in ("image_k_bias", "image_v_bias", "image_logit_bias", "image_score_bias"):
            bias = getattr(inputs, name)
            if bias is not None:
                self.inputs[name] = bias.to(wide).contiguous()

    def run(self, direction: str, **tensors: Tensor | None) -> None:
        tensors |= self.inputs
        function = native().image_attn_forward if direction == "forward" else native().image_attn_backward
        addresses = {name: (t.data_ptr(), t.stride()) for name, t in tensors.items() if t is not None}
        function(cpu_isa(), self.dtype, self.sizes, self.scale, self.softcap, torch.get_num_threads(), addresses)


def text_segments(
    batch: int, num_queries: int, num_keys: int, first_key: Tensor | None, causal: bool
) -> Iterator[TextSegment]:
    """Cuts the visible (query, key) pairs of the text into calls of the flash kernel.

    Consecutive queries with the same first_key (a document, or everything after left padding) see a rectangle and a
    causal square, which need no mask. Masks are used in two cases. If first_key changes from query to query (sliding
    windows, anything irregular), blocks of queries are masked over just the keys that they see. If rows of few queries
    (a token of each text that is being generated) begin at different keys, all rows are one masked call.
    """
    everything = slice(0, batch)
    if first_key is None:
        yield from _run_segments(everything, 0, num_queries, 0, num_queries, num_keys, causal)
        return
    first_key = first_key.clamp(0, num_keys)
    row_starts = _change_points((first_key[1:] != first_key[:-1]).any(-1), batch)
    if len(row_starts) > 2 and num_queries < MIN_RUN:
        yield from _masked(everything, slice(0, num_queries), first_key, num_queries, num_keys, causal)
        return
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
                yield from _masked(rows, slice(start, stop), firsts[None], num_queries, num_keys, causal)
            at = last


def _masked(
    rows: slice, queries: slice, first_key: Tensor, num_queries: int, num_keys: int, causal: bool
) -> Iterator[TextSegment]:
    """One segment of these queries; first_key (rows or 1, num_queries)."""
    firsts = first_key[:, queries]
    prefix = num_keys - num_queries
    keys = slice(int(firsts.min()), queries.stop + prefix if causal else num_keys)
    if keys.start < keys.stop:
        key = torch.arange(keys.start, keys.stop, device="cpu")
        visible = key >= firsts[..., None]  # (rows or 1, queries, keys)
        if causal:
            visible &= key <= torch.arange(queries.start, queries.stop, device="cpu")[:, None] + prefix
        yield TextSegment(rows, queries, keys, visible=visible[:, None])


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


def _segments(inputs: Inputs) -> list[TextSegment]:
    batch, _, num_queries, _ = inputs.q.shape
    num_keys, first_key, lengths = inputs.k.shape[2], inputs.first_key, inputs.cache_seqlens
    if lengths is None:
        return list(text_segments(batch, num_queries, num_keys, first_key, inputs.causal))
    check_cache_seqlens(lengths, num_keys)
    segments = []
    for row, row_end in pairwise(_change_points(lengths[1:] != lengths[:-1], batch)):
        first_key = None if inputs.first_key is None else inputs.first_key[row:row_end]
        for segment in text_segments(row_end - row, num_queries, int(lengths[row]), first_key, inputs.causal):
            rows = slice(segment.rows.start + row, segment.rows.stop + row)
            segments.append(replace(segment, rows=rows))
    return segments


def _text_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    q, k, v = inputs[:3]
    segments = _segments(inputs)
    if len(segments) == 1 and _covers(segments[0], q):
        segment = segments[0]
        out, lse = _attend(inputs, segment, q, k[:, :, segment.keys], v[:, :, segment.keys])
        return out, lse.contiguous()
    out = torch.empty_like(q)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for segment in segments:
        at = (segment.rows, slice(None), segment.queries)
        keys = (segment.rows, slice(None), segment.keys)
        part, part_lse = _attend(inputs, segment, q[at], k[keys], v[keys])
        if segment.visible is not None:  # the kernel returns lse 0 for a query that sees nothing
            part_lse = part_lse.masked_fill(~segment.visible.any(-1), -torch.inf)
        if segment.joins:
            joint = torch.logaddexp(lse[at], part_lse)
            earlier = torch.exp(lse[at] - joint).unsqueeze(-1) * out[at]
            part = earlier + torch.exp(part_lse - joint).unsqueeze(-1) * part
            part_lse = joint
        out[at] = part
        lse[at] = part_lse
    unseen = lse == -torch.inf
    if unseen.any():
        out[unseen] = 0
    return out, lse


def _text_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs[:3]
    head_dim = q.shape[-1]
    unit: Tensor | None = None  # the gradients' scale, a power of two
    if grad_lse is not None:
        # The kernel takes no gradient of lse, but computes delta = sum(grad_out * out). A column with -1 in out and
        # grad_lse in grad_out turns delta into sum(grad_out * out) - grad_lse. Zeros in q, k and v exclude that column
        # from everything else, and eight columns preserve the alignment of rows. Three of them hold grad_lse and its
        # remainders after rounding to 16 bits, so that both parts of the backward use the same value.
        grad_out, out, q, k, v = (torch.nn.functional.pad(t, (0, 8)) for t in (grad_out, out, q, k, v))
        if q.dtype == torch.float16:  # its range ends at 2^16, in the kernel's products with the weights too
            largest = grad_lse.abs().nan_to_num(posinf=0).amax()
            unit = torch.exp2(torch.log2(largest / 2**14).ceil().clamp(min=0))
            grad_out, grad_lse = (grad_out / unit).to(q.dtype), grad_lse / unit
        rest = grad_lse
        for column in range(head_dim, head_dim + 3):
            out[..., column] = -1
            grad_out[..., column] = rest
            rest = rest - grad_out[..., column]
    segments = _segments(inputs)
    if len(segments) == 1 and _covers(segments[0], q) and segments[0].keys == slice(0, k.shape[2]):
        grad_q, grad_k, grad_v = _attend_backward(inputs, segments[0], grad_out, q, k, v, out, lse)
    else:
        # Overlapping segments add up in lse's precision.
        grad_q, grad_k, grad_v = (
            t.new_zeros(t.transpose(1, 2).shape, dtype=lse.dtype).transpose(1, 2) for t in (q, k, v)
        )
        for segment in segments:
            at = (segment.rows, slice(None), segment.queries)
            keys = (segment.rows, slice(None), segment.keys)
            parts = _attend_backward(inputs, segment, grad_out[at], q[at], k[keys], v[keys], out[at], lse[at])
            for gradient, part, where in zip((grad_q, grad_k, grad_v), parts, (at, keys, keys), strict=True):
                gradient[where] += part
    if unit is not None:
        grad_q, grad_k, grad_v = (g * unit for g in (grad_q, grad_k, grad_v))
    grad_q, grad_k, grad_v = (g.to(q.dtype) for g in (grad_q, grad_k, grad_v))
    if grad_lse is not None:
        grad_q, grad_k, grad_v = (
            g[..., :head_dim].transpose(1, 2).contiguous().transpose(1, 2) for g in (grad_q, grad_k, grad_v)
        )
    return grad_q, grad_k, grad_v


def _attend(inputs: Inputs, segment: TextSegment, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if inputs.softcap is not None:
        return cpu_softcap.forward(q, k, v, segment.causal, segment.visible, inputs.scale, inputs.softcap)
    mask = _additive(segment.visible, q)
    return _flash(q, k, v, 0.0, segment.causal, attn_mask=mask, scale=inputs.scale)


def _attend_backward(
    inputs: Inputs, segment: TextSegment, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of one segment."""
    if inputs.softcap is not None:
        limits = (segment.causal, segment.visible, inputs.scale, inputs.softcap)
        return cpu_softcap.backward(grad_out, q, k, v, out, lse, *limits)
    mask = _additive(segment.visible, inputs.q)
    return _flash_backward(grad_out, q, k, v, out, lse, 0.0, segment.causal, attn_mask=mask, scale=inputs.scale)


def _covers(segment: TextSegment, q: Tensor) -> bool:
    return segment.visible is None and segment.rows == slice(0, q.shape[0]) and segment.queries == slice(0, q.shape[2])


def _additive(visible: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as the kernel takes it: additive, because it rejects booleans, and with 2 or 4 dimensions."""
    return None if visible is None else q.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)
