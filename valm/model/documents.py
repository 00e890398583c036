"""Documents in rows of tokens: where each begins, its positions, and the mask that keeps a text block inside it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """first_key: (B, T) int32, the first key of each token's document. position_ids: (B, T) int64, the distance from
    it, 0 at padding. present: (B, T) bool, False at padding; None = no padding."""

    first_key: Tensor
    position_ids: Tensor
    present: Tensor | None


def find_documents(begins: Tensor, mask: Tensor | None, *, past: int = 0, first_key: Tensor | None = None) -> Documents:
    """The documents of T tokens behind `past` others. One begins where `begins` says so, and behind padding.

    Args:
        begins: (B, T) bool.
        mask: (B, 1 + T), 0 at padding, of the token before these (0 where there is none) and of these; None = no
            padding.
        first_key: (B,) int32, of the document that the last of the `past` tokens belongs to.
    """
    batch, length = begins.shape
    key = torch.arange(past, past + length, dtype=torch.int32, device=begins.device)
    present = None
    if mask is not None:
        text = mask.bool()
        present = text[:, 1:]
        begins = present & (begins | ~text[:, :-1])
    if first_key is None:
        first_key = torch.zeros(batch, dtype=torch.int32, device=begins.device)
    first_keys = torch.where(begins, key, first_key[:, None])
    if length > 1:
        first_keys = first_keys.cummax(dim=1).values
    positions = (key - first_keys).long()
    if present is not None:
        positions = positions.masked_fill(~present, 0)
    return Documents(first_keys, positions, present)


def check_bounds(cu_seqlens: Tensor, max_seqlen: int | None, documents: Documents) -> None:
    """Checks on the CPU that documents begin where cu_seqlens says; elsewhere that would wait for the device.

    Args:
        cu_seqlens: (N + 1,), the documents of the B rows, one row behind the other. Padding is of the document before.
        max_seqlen: at least the tokens of the longest, or None.

    Raises:
        ValueError: one does not, or is longer.
    """
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first_key, _, present = documents
    batch, length = first_key.shape
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[-1]) != batch * length or (lengths < 0).any():
        raise ValueError(f"cu_seqlens must rise to {batch * length}, the tokens of all rows, got {cu_seqlens.tolist()}")
    if max_seqlen is not None and int(lengths.max()) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but cu_seqlens has a document of {int(lengths.max())} tokens")
    row_start = length * torch.arange(batch)[:, None]  # (B, 1)
    starts = cu_seqlens[:-1].unique()
    token = row_start + torch.arange(length)  # (B, T)
    before = torch.searchsorted(starts, token, right=True) - 1
    wrong = (starts[before] - row_start != first_key) | (before < 0)
    if present is not None:
        wrong &= present
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"cu_seqlens says that the document of token {column} in row {row} begins elsewhere than at token "
            f"{int(first_key[row, column])}, where it does: leave it out, and it is found"
        )


def unless_all_zero(first_key: Tensor) -> Tensor | None:
    """None if every query sees everything before it, which is faster.

    A GPU is waited for where a whole text is read without gradients, in evaluation and before a generation, which then
    need no masks. A step of training or generation does not wait, and a compiled or captured graph cannot look.
    """
    if torch.compiler.is_compiling():
        return first_key
    if first_key.device.type == "cuda":
        reads = first_key.shape[1] > 1 and not torch.is_grad_enabled()
        looks = reads and not torch.cuda.is_current_stream_capturing()
    else:
        looks = first_key.device.type == "cpu"
    return None if looks and not first_key.any() else first_key


def text_mask(
    first_key: Tensor | None,
    shape: tuple[int, int],
    past: int,
    *,
    float_dtype: torch.dtype | None,
    device: torch.device,
) -> Tensor:
    """The mask (B or 1, 1, T, S) of text blocks for `shape` (T, S).

    Args:
        first_key: (B, T), None = 0.
        past: tokens before these T; behind all of them, up to S, are keys that are not used yet.
        float_dtype: of a mask that is added to the scores; None makes one of bool.
    """
    length, num_keys = shape
    query = torch.arange(length, device=device) + past
    key = torch.arange(num_keys, device=device)
    mask = (key <= query[:, None])[None, None]  # (1, 1, T, S)
    if first_key is not None:
        mask = mask & (key >= first_key[:, None, :, None])  # (B, 1, T, S)
    if float_dtype is None:
        return mask
    return torch.zeros(mask.shape, dtype=float_dtype, device=device).masked_fill(~mask, torch.finfo(float_dtype).min)


class Restarts(NamedTuple):
    """Of positions (B, T): `begins` (B, T) bool, whether another document begins there, behind one in the row. `odd`
    bool tensor, whether a document has a gap in its positions, or padding inside it."""

    begins: Tensor
    odd: Tensor


def mask_of_tokens(mask: Tensor, cache: Any, length: int) -> Tensor:
    """The part (B, T) of an attention mask (B, S) that is of the T = `length` tokens of a pass, read before it fills
    `cache` (None if there is none).

    Columns are of keys, as in transformers: a mask may be wider, with columns for tokens that come later.

    Raises:
        ValueError: it lacks columns for these tokens.
    """
    past = 0 if cache is None else cache.get_seq_length()
    if isinstance(past, Tensor):  # of a static cache
        if torch.compiler.is_compiling() or past.device.type != "cpu":  # whose value a graph lacks, or a GPU waits for
            return mask[:, past + torch.arange(length, device=mask.device)]
        past = int(past)
    if mask.shape[1] < past + length:
        raise ValueError(
            f"attention_mask must have a column for each of the {past} tokens in the cache and of these {length}, got "
            f"{mask.shape[1]} columns"
        )
    return mask[:, past : past + length]


def restarts(position_ids: Tensor, mask: Tensor | None, text_before: Tensor | None = None) -> Restarts:
    """Finds documents by their positions.

    Args:
        mask: (B, T), 0 at padding; None = no padding.
        text_before: (B,) bool, whether a row has text before these tokens; None = none has.
    """
    text = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask.bool()
    step = position_ids.diff(dim=1)
    goes_on = text[:, 1:] & text[:, :-1]
    after_gap = behind_gap(text)
    at_start = position_ids[:, 1:] == 0
    first = torch.zeros_like(text[:, :1])
    if text_before is not None:
        first = (text_before & text[:, 0] & (position_ids[:, 0] == 0))[:, None]
    begins = torch.cat([first, (goes_on & (step <= 0)) | (after_gap & at_start)], 1)
    return Restarts(begins, (goes_on & (step > 1)).any() | (after_gap & ~at_start).any())


def behind_gap(text: Tensor) -> Tensor:
    """(B, T - 1) bool: of each token but the first, whether it is the first behind padding inside a row; `text` (B, T)
    is False at padding."""
    return text[:, 1:] & ~text[:, :-1] & (text.cumsum(1) > 0)[:, :-1]


def padding_apart(position_ids: Tensor, mask: Tensor) -> Tensor:
    """The positions (B, T) with others at padding, 0 in `mask` (B, T), that make each padding token a document of its
    own: transformers sees documents where a position is not the one before it plus 1."""
    return torch.where(mask.bool(), position_ids, position_ids.amax(-1, keepdim=True))


class SplitRows(NamedTuple):
    """ids and mask (N, L) int64: N documents, a row each, padded on the right. row and column (B, T): where the tokens
    of the rows that they were in are now."""

    ids: Tensor
    mask: Tensor
    row: Tensor
    column: Tensor


def split_rows(ids: Tensor, mask: Tensor | None, begins: Tensor) -> SplitRows:
    """A row for each document of rows (B, T) of several; `begins` (B, T) is as in `Restarts`."""
    start = begins.index_fill(1, torch.zeros(1, dtype=torch.int64, device=ids.device), True)
    key = torch.arange(ids.shape[1], device=ids.device)
    row = start.flatten().cumsum(0).view(ids.shape) - 1
    column = key - torch.where(start, key, 0).cummax(1).values
    split = ids.new_zeros(int(row[-1, -1]) + 1, int(column.max()) + 1)
    real = torch.zeros_like(split)
    split[row, column] = ids
    real[row, column] = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
    return SplitRows(split, real, row, column)
