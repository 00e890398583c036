"""`ShardedIPIndex`: one exact index over several devices, such as the GPUs of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from .checks import allowed_rows, as_tensor, check_database, check_search
from .index import FlatIPIndex
from .result import NumpyTopK, TopK, like_queries, merge_topk

if TYPE_CHECKING:
    import numpy as np


class ShardedIPIndex:
    """A `FlatIPIndex` whose rows are divided among devices, with the same result: each searches its own rows, GPUs at
    the same time, and `merge_topk` joins what they found on the first. Its rows never change, and threads may share it.

    Args:
        database, dtype, pack: as in `FlatIPIndex`.
        devices: each stores an equal part of the rows, in their order. Queries and results are on the first. A device
            may be named several times.

    Raises:
        TypeError, ValueError: as `FlatIPIndex`; also no devices, or fewer rows than devices.
    """

    def __init__(
        self,
        database: Tensor | np.ndarray,
        devices: Sequence[torch.device | str],
        dtype: str | None = None,
        *,
        pack: bool = True,
    ) -> None:
        rows = as_tensor(database, "database")
        check_database(rows)
        if isinstance(devices, str):
            raise TypeError(f"devices must be a sequence of devices, such as [{devices!r}], but is one string")
        if not 1 <= len(devices) <= len(rows):
            raise ValueError(
                f"devices names {len(devices)} devices, expected 1 to the {len(rows)} rows of the database"
            )
        ends = [len(rows) * number // len(devices) for number in range(len(devices) + 1)]
        self._bounds = list(pairwise(ends))
        self._parts = []
        for (start, end), device in zip(self._bounds, devices, strict=True):
            try:
                self._parts.append(FlatIPIndex(rows[start:end], dtype, device, pack=pack))
            except ValueError as error:
                raise ValueError(
                    f"database[{start}:{end}], whose row 0 is row {start} of the database: {error}"
                ) from error

    def __len__(self) -> int:
        return self._bounds[-1][1]

    def __repr__(self) -> str:
        devices = ", ".join(str(part.device) for part in self._parts)
        return f"ShardedIPIndex({len(self)} rows of {self.dim} {self._parts[0].dtype} on {devices})"

    @property
    def dim(self) -> int:
        return self._parts[0].dim

    @property
    def device(self) -> torch.device:
        """The first device: of the queries and the results."""
        return self._parts[0].device

    @overload
    def search(self, queries: Tensor, k: int, *, allowed: Tensor | np.ndarray | None = None) -> TopK: ...
    @overload
    def search(self, queries: np.ndarray, k: int, *, allowed: Tensor | np.ndarray | None = None) -> NumpyTopK: ...
    def search(
        self, queries: Tensor | np.ndarray, k: int, *, allowed: Tensor | np.ndarray | None = None
    ) -> TopK | NumpyTopK:
        """The k best rows of each query (..., E), or of those that `allowed` names, as `FlatIPIndex.search`. Scores
        have no gradient, as if queries and database were detached.

        Raises:
            TypeError, ValueError: as `ip_topk`.
        """
        flat = as_tensor(queries, "queries")
        check_search(flat, len(self), self.dim, self.device, k)
        flags = allowed_rows(allowed, len(self), self.device)
        found = []
        for part, (start, end) in zip(self._parts, self._bounds, strict=True):
            some = None if flags is None else flags[start:end].to(part.device)
            found.append(part.search(flat.to(part.device), min(k, len(part)), allowed=some))
        # a GPU is waited for only here, when all are at work
        here = [TopK(scores.to(self.device), rows.to(self.device)) for scores, rows in found]
        return like_queries(queries, *merge_topk(here, [start for start, _ in self._bounds], k))
