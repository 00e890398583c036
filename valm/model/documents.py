"""Several documents in a row of tokens: each begins where the positions restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from valm.model.positions import cache_of

SEVERAL = "position_ids restart, so a row contains several documents, {why}: give each document its own row"
CACHED = "which a cache cannot hold (use_cache=False takes them)"
ODD = "and a document has a gap in its positions or padding inside it"
MIXED = "which {decoder} does not keep apart"
IN_A_GRAPH = (
    "which a compiled model keeps apart only without an attention_mask and with use_cache=False, and only if its "
    "family keeps documents apart"
)


class Restarts(NamedTuple):
    """The documents in rows of positions (B, T). begins: (B, T) bool, True where a second or later document of the row
    begins. odd: bool tensor, whether a document contains padding or a gap in its positions."""

    begins: Tensor
    odd: Tensor


def mask_of_tokens(mask: Tensor, cache: Any, length: int) -> Tensor:
    """The columns (B, T) of an attention mask (B, S) for the T = `length` tokens of a pass, before the pass fills
    `cache` (None = no cache).

    As in transformers, columns are keys; a mask may contain further columns for later tokens.

    Raises:
        ValueError: the mask lacks columns for these tokens.
    """
    past = 0 if cache is None else cache.get_seq_length()
    if isinstance(past, Tensor):  # a static cache
        if torch.compiler.is_compiling() or past.device.type != "cpu":  # unknown in a graph; would sync a GPU
            return mask[:, past + torch.arange(length, device=mask.device)]
        past = int(past)
    if mask.shape[1] < past + length:
        raise ValueError(
            f"attention_mask must have a column for each of the {past} tokens in the cache and of these {length}, got "
            f"{mask.shape[1]} columns"
        )
    return mask[:, past : past + length]


def told_apart(decoder: Any, arguments: dict[str, Any], keeps_apart: Callable[[], bool]) -> dict[str, Any]:
    """The arguments of a decoder, changed so that transformers keeps the documents of a row apart. It does so by
    restarting positions, without a mask and without a cache; otherwise it would silently mix the documents.

    keeps_apart: whether the decoder tells documents apart by their positions.

    Raises:
        ValueError: a row contains several documents, and there is a cache, a gap inside a document, or a decoder that
            mixes documents.
    """
    positions, own = _placed(arguments)
    if positions is None:
        return arguments
    found = restarts(positions, own)
    restart, odd = torch.stack([found.begins.any(), found.odd]).tolist()
    if not restart:
        return arguments
    cached = cache_of(arguments) is not None or arguments.get("use_cache")
    why = CACHED if cached else ODD if odd else None
    if why is None and not keeps_apart():
        why = MIXED.format(decoder=type(decoder).__name__)
    if why is not None:
        raise ValueError(SEVERAL.format(why=why))
    if own is not None:
        positions = padding_apart(positions, own)
    return arguments | {"position_ids": positions, "attention_mask": None, "use_cache": False}


def check_in_a_graph(arguments: dict[str, Any], caches: bool, keeps_apart: Callable[[], bool]) -> None:
    """`told_apart` for a compiled graph, which cannot read positions. Unless transformers itself keeps documents apart,
    a row with several documents ends the graph with a RuntimeError.

    caches: whether the decoder makes a cache by default.
    """
    positions, own = _placed(arguments)
    if positions is None:
        return
    use_cache = arguments.get("use_cache")
    cached = cache_of(arguments) is not None or (caches if use_cache is None else use_cache)
    if own is not None or cached or not keeps_apart():
        torch._assert_async(~restarts(positions, own).begins.any(), SEVERAL.format(why=IN_A_GRAPH))


def _placed(arguments: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Positions (B, T) and the mask's columns (B, T) for these tokens. The positions are None if they do not show where
    documents begin, as in a step of `generate`."""
    positions, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    if positions is None or positions.dim() != 2 or positions.shape[1] == 1:
        return None, None
    if mask is None:
        return positions, None
    length = positions.shape[1]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < length:
        return None, None
    placed = torch.broadcast_tensors(positions, mask_of_tokens(mask, cache_of(arguments), length))
    return placed[0], placed[1]


def restarts(position_ids: Tensor, mask: Tensor | None) -> Restarts:
    """Finds documents by their positions. `mask` (B, T) is 0 at padding; None = no padding."""
    text = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask.bool()
    step = position_ids.diff(dim=1)
    goes_on = text[:, 1:] & text[:, :-1]
    behind_padding = text[:, 1:] & ~text[:, :-1] & (text.cumsum(1) > 0)[:, :-1]
    at_start = position_ids[:, 1:] == 0
    begins = F.pad((goes_on & (step <= 0)) | (behind_padding & at_start), (1, 0))
    return Restarts(begins, (goes_on & (step > 1)).any() | (behind_padding & ~at_start).any())


def padding_apart(position_ids: Tensor, mask: Tensor) -> Tensor:
    """The positions (B, T), changed at padding (`mask` (B, T) is 0) so that each padding token is a separate document.

    In transformers, a document begins where a position is not its predecessor plus 1; in `restarts`, where it is not
    greater. Padding before the text gets large positions, because the text may begin at any position.
    """
    text = mask.bool()
    before = text.cumsum(1) == 0
    return torch.where(text, position_ids, torch.where(before, position_ids.amax(-1, keepdim=True), 0))


class SplitRows(NamedTuple):
    """ids and mask (N, L) int64: N documents, a row each, padded on the right. row and column (B, T): the new place of
    each token."""

    ids: Tensor
    mask: Tensor
    row: Tensor
    column: Tensor


def split_rows(ids: Tensor, mask: Tensor | None, begins: Tensor) -> SplitRows:
    """Gives each document of the rows (B, T) a row; `begins` (B, T) is as in `Restarts`."""
    start = begins.index_fill(1, torch.zeros(1, dtype=torch.int64, device=ids.device), True)
    key = torch.arange(ids.shape[1], device=ids.device)
    row = start.flatten().cumsum(0).view(ids.shape) - 1
    column = key - torch.where(start, key, 0).cummax(1).values
    split = ids.new_zeros(int(row[-1, -1]) + 1, int(column.max()) + 1)
    real = torch.zeros_like(split)
    split[row, column] = ids
    real[row, column] = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
    return SplitRows(split, real, row, column)
