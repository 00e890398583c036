"""Argument checks of `ip_topk` and `FlatIPIndex`: each error names the argument, what came and what was expected."""

from __future__ import annotations

import operator
import sys
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

MAX_TOPK = 1024
MIN_DIM, MAX_DIM = 8, 2048
# Row numbers have 32 bits. A larger database needs several indexes and `merge_topk`.
MAX_ROWS = 2**31 - 1
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Values per step of a scan over a whole tensor (4 MiB of float32).
SCAN_VALUES = 1 << 20


def is_array(value: Any) -> TypeGuard[np.ndarray]:
    """Whether `value` is a numpy array, without importing numpy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def as_tensor(value: Tensor | np.ndarray, name: str) -> Tensor:
    """`value` as a tensor over the same memory.

    Raises:
        TypeError: it is neither a tensor nor an array.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if not is_array(value):
        raise TypeError(f"{name} must be a torch tensor or a numpy array, but is a {type(value).__name__}")
    if hasattr(value, "mask"):  # numpy.ma
        raise TypeError(f"{name} has a mask, which a search ignores: fill it, or pass allowed")
    if value.dtype.kind not in "fi" or not value.dtype.isnative:
        raise TypeError(f"{name} must hold floating-point numbers (ids: int64), but has numpy dtype {value.dtype}")
    if not all(stride > 0 for stride in value.strides) or not value.flags.writeable:
        return _read_only_tensor(value)
    return torch.from_numpy(value)


def _read_only_tensor(array: np.ndarray) -> Tensor:
    """A tensor over a read-only array (a memory-mapped file), without torch's warning. It is never written."""
    import numpy as np

    array = np.ascontiguousarray(array)
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    return torch.from_numpy(np.asarray(_Memory(interface, array)))


class _Memory:
    """An object that numpy reads as an array, over memory that `owner` keeps alive."""

    def __init__(self, interface: dict[str, Any], owner: np.ndarray):
        self.__array_interface__ = interface
        self.owner = owner


def check_float(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected one of {expected}: convert it first")


def check_database(database: Tensor, several: bool = False) -> None:
    """Checks a database (N, E), or with `several` also (..., N, E)."""
    if database.dim() != 2 and not (several and database.dim() > 2):
        expected = "(N, E) or (..., N, E)" if several else "(N, E)"
        raise ValueError(f"database must have shape {expected}, but has shape {tuple(database.shape)}")
    rows, dim = database.shape[-2:]
    if database.shape[:-1].numel() == 0:
        raise ValueError("database is empty: it has no rows to search")
    if rows > MAX_ROWS:
        raise ValueError(f"database has {rows} rows, at most {MAX_ROWS} fit: split it and join results by merge_topk")
    if not MIN_DIM <= dim <= MAX_DIM:
        raise ValueError(f"database has E = {dim}, expected {MIN_DIM} to {MAX_DIM}")


def check_queries(queries: Tensor, dim: int, device: torch.device) -> None:
    check_float(queries, "queries")
    if queries.dim() == 0 or queries.shape[-1] != dim:
        raise ValueError(f"queries must have shape (..., {dim}) as the database, but have {tuple(queries.shape)}")
    if queries.device != device:
        raise ValueError(f"queries are on {queries.device}, the database is on {device}: move one of them")


def check_search(queries: Tensor, rows: int, dim: int, device: torch.device, k: SupportsIndex) -> int:
    """k as an int."""
    check_queries(queries, dim, device)
    if not isinstance(k, int) and hasattr(k, "__index__"):  # a numpy integer
        k = operator.index(k)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, but is a {type(k).__name__}")
    if not 1 <= k <= MAX_TOPK:
        raise ValueError(f"k is {k}, expected 1 to {MAX_TOPK}")
    if k > rows:
        raise ValueError(f"k is {k}, but the database has only {rows} rows")
    return k


def check_queries_of_each(queries: Tensor, databases: Tensor, allowed: object) -> None:
    """Checks queries (..., Q, E) of databases (..., N, E)."""
    leading = databases.shape[:-2]
    if queries.dim() != databases.dim() or queries.shape[:-2] != leading:
        shape = ", ".join(map(str, (*leading, "Q", databases.shape[-1])))
        raise ValueError(
            f"queries must have shape ({shape}), Q queries for each database of {tuple(databases.shape)}, but have "
            f"{tuple(queries.shape)}"
        )
    if allowed is not None:
        raise ValueError("allowed names rows of one database (N, E), but there are several: search them one by one")


def check_ids(ids: Tensor, count: int, device: torch.device, name: str) -> None:
    """Checks ids (n,) int64 from 0 to count - 1, on `device`."""
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {ids.dtype}, expected int64")
    if ids.dim() != 1:
        raise ValueError(f"{name} must have shape (n,), but has shape {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"{name} is on {ids.device}, the database is on {device}: move one of them")
    if len(ids) and not (ids.min() >= 0 and ids.max() < count):
        raise ValueError(f"{name} must be from 0 to {count - 1}, but goes from {int(ids.min())} to {int(ids.max())}")


def distinct_ids(ids: Tensor | np.ndarray, rows: int) -> Tensor:
    """A copy of the ids of rows, (N,) int64.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, or ids that are negative or not distinct.
    """
    found = as_tensor(ids, "ids")
    if found.dtype != torch.int64:
        raise TypeError(f"ids has dtype {found.dtype}, expected int64")
    if tuple(found.shape) != (rows,):
        raise ValueError(f"ids must have shape ({rows},), one for each row, but has {tuple(found.shape)}")
    ordered = found.sort().values
    if rows and ordered[0] < 0:
        raise ValueError(f"ids contains {int(ordered[0])}, but must not be negative: -1 stands for no row")
    same = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(same):
        raise ValueError(f"ids contains {int(same[0])} more than once")
    return found.clone()


def allowed_rows(
    allowed: Tensor | np.ndarray | None, rows: int, device: torch.device, what: str = "allowed"
) -> Tensor | None:
    """The rows that a search may return as (N,) bool; None if all.

    Args:
        allowed: (N,) bool, or the numbers of the rows (n,) int64.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, or on the CPU a number out of range.
    """
    if allowed is None:
        return None
    if is_array(allowed) and allowed.dtype == bool:
        allowed = torch.from_numpy(allowed.copy())
    found = as_tensor(allowed, what)
    if found.dtype not in (torch.bool, torch.int64):
        raise TypeError(f"{what} has dtype {found.dtype}, expected bool (a flag a row) or int64 (row numbers)")
    if found.dim() != 1 or (found.dtype == torch.bool and len(found) != rows):
        raise ValueError(f"{what} must have shape ({rows},) bool or (n,) int64, but has shape {tuple(found.shape)}")
    if found.device != device:
        raise ValueError(f"{what} is on {found.device}, the database is on {device}: move one of them")
    if found.dtype == torch.bool:
        return found
    if device.type == "cpu":
        check_ids(found, rows, device, what)
    return torch.zeros(rows, dtype=torch.bool, device=device).index_fill_(0, found, True)


def check_finite(rows: Tensor, what: str) -> None:
    """Checks that rows (N, E) are finite.

    Raises:
        ValueError: a row holds NaN or infinity; the message names the first such row.
    """
    step = max(1, SCAN_VALUES // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        # NaN and infinity always show in the sum, but finite rows may overflow too
        if not part.sum(dtype=torch.float32).isfinite():
            broken = ~part.isfinite().all(1)
            if broken.any():
                row = start + int(broken.nonzero()[0])
                raise ValueError(f"{what} row {row} holds NaN or infinity; every stored number must be finite")
