"""The native CPU search: passes checked tensors as pointers, and packs rows to speed up repeated searches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..native import cpu_isa, native, survives_fork
from .reference import EXACT_LANES

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
}
PANEL_ROWS = 32  # csrc/topk/topk.hpp
STATS = 4


class PackedRows(NamedTuple):
    """Input of the first pass: the centred rows at 8 bits an element (csrc/topk/cpu/first_pass.hpp).

    codes (panels, ceil(E / 4), 32, 4) uint8 · stats (panels, 4, 32) float32 · frame (2, E) float32, the centre and
    the axis. Equal rows are packed once: first_rows (packed rows,) int32 and next_duplicate (N,) int32 lead to the
    duplicates.
    """

    codes: Tensor
    stats: Tensor
    frame: Tensor
    first_rows: Tensor | None = None
    next_duplicate: Tensor | None = None


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _native_rows(rows: Tensor, row_scale: Tensor | None) -> object:
    return native().Rows(rows.data_ptr(), _pointer(row_scale), DTYPE_NAMES[rows.dtype], *rows.shape[-2:])


def _native_packed_rows(packed: PackedRows, count: int) -> object:
    codes, stats, frame, first_rows, next_duplicate = packed
    count = count if first_rows is None else first_rows.shape[0]
    return native().PackedRows(
        codes.data_ptr(),
        stats.data_ptr(),
        frame[0].data_ptr(),
        frame[1].data_ptr(),
        count,
        _pointer(first_rows),
        _pointer(next_duplicate),
    )


def _refuse(row: int, rows: Tensor) -> None:
    if row >= 0:
        of_several = f" of database {row // rows.shape[1]} (of {len(rows)}, from 0)" if rows.dim() == 3 else ""
        raise ValueError(
            f"database row {row % rows.shape[-2]}{of_several} holds NaN or infinity; every stored number must be finite"
        )


@survives_fork
def pack(rows: Tensor, row_scale: Tensor | None) -> PackedRows:
    """The packed copy of contiguous rows (N, E).

    Raises:
        ValueError: a row is not finite; the message has its number.
    """
    first_rows, next_duplicate, different = _equal_rows(rows, row_scale)
    distinct = different == len(rows)
    packed = PackedRows(
        *_empty_panels(different, rows),
        frame=rows.new_empty(2, rows.shape[1], dtype=torch.float32),
        first_rows=None if distinct else first_rows,
        next_duplicate=None if distinct else next_duplicate,
    )
    _pack(rows, row_scale, packed, 0)
    return packed


@survives_fork
def extend(packed: PackedRows, count: int, rows: Tensor, row_scale: Tensor | None) -> PackedRows:
    """The packed copy of contiguous rows (N, E) whose first `count` rows are in `packed`.

    Packs only the new rows, around the centre of the old ones. A new row that equals an old one is packed too, which
    costs time if there are many and changes no result.

    Raises:
        ValueError: a row is not finite; the message has its number.
    """
    new_rows, new_next, different = _equal_rows(rows[count:], None if row_scale is None else row_scale[count:])
    first_rows, next_duplicate = packed.first_rows, packed.next_duplicate
    packed_before = count if first_rows is None else len(first_rows)
    if first_rows is not None or different < len(rows) - count:
        if first_rows is None or next_duplicate is None:
            first_rows = torch.arange(count, dtype=torch.int32, device=rows.device)
            next_duplicate = torch.zeros_like(first_rows)
        first_rows = torch.cat([first_rows, new_rows + count])
        next_duplicate = torch.cat([next_duplicate, torch.where(new_next > 0, new_next + count, 0)])
    codes, stats = _empty_panels(packed_before + different, rows)
    whole = packed_before // PANEL_ROWS
    codes[:whole], stats[:whole] = packed.codes[:whole], packed.stats[:whole]
    extended = PackedRows(codes, stats, packed.frame.clone(), first_rows, next_duplicate)
    _pack(rows, row_scale, extended, whole)
    return extended


def _equal_rows(rows: Tensor, row_scale: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """`PackedRows.first_rows` and next_duplicate, and the number of different rows."""
    first_rows = rows.new_empty(len(rows), dtype=torch.int32)
    next_duplicate = torch.empty_like(first_rows)
    native_rows = _native_rows(rows, row_scale)
    different = native().find_duplicates(
        native_rows, torch.get_num_threads(), first_rows.data_ptr(), next_duplicate.data_ptr()
    )
    return first_rows[:different].clone(), next_duplicate, different


def _empty_panels(count: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and stats for `count` packed rows of the width of `rows`."""
    panels = -(-count // PANEL_ROWS)
    codes = rows.new_empty(panels, -(-rows.shape[1] // 4), PANEL_ROWS, 4, dtype=torch.uint8)
    return codes, rows.new_empty(panels, STATS, PANEL_ROWS, dtype=torch.float32)


def _pack(rows: Tensor, row_scale: Tensor | None, packed: PackedRows, first_panel: int) -> None:
    """Fills the panels from `first_panel` on, and if that is 0 also the frame."""
    native_packed = _native_packed_rows(packed, len(rows))
    broken_row = native().pack(
        _native_rows(rows, row_scale), native_packed, first_panel, cpu_isa(), torch.get_num_threads()
    )
    _refuse(broken_row, rows)


@survives_fork
def search(
    queries: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    packed: PackedRows | None,
    k: int,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores and indices (Q, k) of queries (Q, E) over contiguous rows, or over the rows in allowed (N,) bool.

    Without `packed`, the search packs and checks the rows block by block. It then also takes n databases (n, N, E),
    without `allowed`, with queries (n, Q, E) and results (n, Q, k).
    """
    queries = queries.float().contiguous()
    # a name, because the native code reads it after this expression
    allowed = None if allowed is None else allowed.contiguous()
    scores = queries.new_empty(*queries.shape[:-1], k)
    indices = scores.new_empty(scores.shape, dtype=torch.int64)
    broken_row = native().ip_topk_cpu(
        queries.data_ptr(),
        queries.shape[-2],
        _native_rows(rows, row_scale),
        rows.shape[:-2].numel(),
        None if packed is None else _native_packed_rows(packed, rows.shape[0]),
        k,
        cpu_isa(),
        torch.get_num_threads(),
        scores.data_ptr(),
        indices.data_ptr(),
        _pointer(allowed),
    )
    _refuse(broken_row, rows)
    return scores, indices


@survives_fork
def pair_scores(queries: Tensor, rows: Tensor, query_ids: Tensor, row_ids: Tensor) -> Tensor:
    """Scores (n,) of the queries (Q, E) and rows (N, E) that the ids (n,) name."""
    queries = queries.float().contiguous()
    if missing := -queries.shape[1] % EXACT_LANES:  # the kernels read a query in steps of EXACT_LANES numbers
        queries = torch.nn.functional.pad(queries, (0, missing))
    rows, query_ids, row_ids = rows.contiguous(), query_ids.contiguous(), row_ids.contiguous()
    scores = queries.new_empty(len(row_ids))
    native().ip_scores_cpu(
        queries.data_ptr(),
        _native_rows(rows, None),
        len(row_ids),
        query_ids.data_ptr(),
        row_ids.data_ptr(),
        cpu_isa(),
        torch.get_num_threads(),
        scores.data_ptr(),
    )
    return scores
