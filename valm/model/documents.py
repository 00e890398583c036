"""Documents in rows of tokens, each of which begins where positions restart."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


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
    own: transformers sees documents where a position is not the one before it plus 1, and `restarts` where it is not
    greater. Before the text the positions are large, as the text may begin at any."""
    text = mask.bool()
    before = text.cumsum(1) == 0
    return torch.where(text, position_ids, torch.where(before, position_ids.amax(-1, keepdim=True), 0))


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
