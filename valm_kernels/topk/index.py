"""`FlatIPIndex`: a database prepared for exact inner product search, in memory or in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor

from ..locks import Lock
from ..memory_maps import exceeds_memory, read_at_random
from ..native import survives_fork
from . import cpu, cuda
from .api import search
from .checks import (
    MAX_ROWS,
    SCAN_VALUES,
    allowed_rows,
    as_tensor,
    check_database,
    check_finite,
    check_float,
    check_search,
    distinct_ids,
)
from .reference import dequantise
from .result import NumpyTopK, TopK, like_queries

if TYPE_CHECKING:
    import numpy as np

    from . import storage

# Stored dtype: torch's type, and numpy's in the file (numpy has no bfloat16).
DTYPES = {
    "float32": (torch.float32, "<f4"),
    "float16": (torch.float16, "<f2"),
    "bfloat16": (torch.bfloat16, "<u2"),
    "int8": (torch.int8, "|i1"),
}
# Makes the first pass's copy of the rows, by device.
PACKERS: dict[str, Callable[[Tensor, Tensor | None], cpu.PackedRows | cuda.RowNorms]] = {
    "cpu": cpu.pack,
    "cuda": cuda.pack,
}
# Brings rows into the memory layout that a device's kernels need.
LAYOUTS = {"cuda": cuda.aligned}
# Added rows are packed around the old centre until there are this many times as many rows. Any centre gives the right
# results, but bounds are looser far from the mean.
GROWTH = 2
# Rows that need more than this share of a device's free memory are streamed: a search needs memory too.
SHARE_OF_DEVICE = 0.8


class _Stored(NamedTuple):
    """What an index holds at one time. A change replaces the whole object, so no search sees half of a change.

    prepared: input of the first pass; None if there is no first pass, or until the next search makes it.
    centred: the number of rows when the packed rows of `prepared` got their centre.
    """

    rows: Tensor
    row_scale: Tensor | None
    ids: Tensor | None
    prepared: cpu.PackedRows | cuda.RowNorms | None
    centred: int = 0


class FlatIPIndex:
    """Exact top-K inner product search over stored rows.

    On the CPU it also stores a packed copy of the rows for a first pass (E + 16 bytes a row), which `save` writes too.
    On a CUDA device it stores their norms (4 bytes a row), and pads E to a multiple of 16.

    Threads and signal handlers may share an index and call any of its methods at once. A search uses the rows that were
    stored when it began. `add` and `remove` run one after the other, and the next search prepares the new rows: run one
    outside of a function that `torch.compile` compiles with fullgraph=True.

    Args:
        database: (N, E) float32, float16 or bfloat16 tensor or numpy array, which may be memory-mapped; E from 8 to
            2048. It is not copied if dtype and device stay the same: do not write to it while the index lives.
        dtype: the stored dtype: "float32", "float16", "bfloat16" or "int8" (symmetric, one float32 scale per row; the
            search is exact over the dequantised rows). None: the dtype of the database.
        device: where the rows are stored and searched. None: the device of the database.
        pack: False stores no packed copy, and every search packs the rows block by block. This is slower, for a
            memory-mapped database whose packed copy would not fit into memory.
        streamed: True leaves the rows in host memory or in their memory-mapped file, and every search copies them to
            the device in chunks. None does so if a CUDA device has too little free memory.
        ids: (N,) int64, distinct and not negative: searches return these ids, and `allowed` and `remove` take them.
            None: rows are numbered from 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a wrong shape, ids that are not distinct, or a row that is not finite as given or in the stored
            dtype.

    Example:
        >>> index = valm_kernels.FlatIPIndex(torch.randn(100, 16))
        >>> index.search(torch.randn(2, 16), k=4).scores.shape
        torch.Size([2, 4])
    """

    @survives_fork
    def __init__(
        self,
        database: Tensor | np.ndarray,
        dtype: str | None = None,
        device: torch.device | str | None = None,
        *,
        pack: bool = True,
        streamed: bool | None = None,
        ids: Tensor | np.ndarray | None = None,
    ) -> None:
        rows = as_tensor(database, "database")
        check_database(rows)
        check_float(rows, "database")
        dtype = cpu.DTYPE_NAMES[rows.dtype] if dtype is None else dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        self._choose_place(rows, dtype, rows.device if device is None else device, streamed)
        self._dim = rows.shape[1]
        row_ids = None if ids is None else distinct_ids(ids, len(rows)).to(self._device)
        rows, row_scale = store(rows, dtype, self._home)
        self._pack = pack and not self._streamed and self._device.type in PACKERS
        self._lock = Lock()  # held while _stored changes
        self._stored = self._prepare(_Stored(self._laid_out(rows), row_scale, row_ids, None))

    def _choose_place(self, rows: Tensor, dtype: str, device: torch.device | str, streamed: bool | None) -> None:
        """Decides where to search and where to store the rows."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if streamed is None and rows.device.type == "cpu" and device.type == "cuda":
            needed = rows.numel() * DTYPES[dtype][0].itemsize
            streamed = needed > SHARE_OF_DEVICE * cuda.free_memory(device)
        self._device, self._streamed = device, bool(streamed)
        self._home = torch.device("cpu") if streamed else device

    def _laid_out(self, rows: Tensor) -> Tensor:
        return LAYOUTS[self._home.type](rows) if self._home.type in LAYOUTS else rows

    def _prepare(self, stored: _Stored) -> _Stored:
        if not self._pack or stored.prepared is not None:
            return stored
        prepared = PACKERS[self._device.type](stored.rows, stored.row_scale)
        return stored._replace(prepared=prepared, centred=len(stored.rows))

    def _searchable(self) -> _Stored:
        """What is stored now, prepared for a search."""
        stored = self._stored
        if self._pack and stored.prepared is None:  # rows were added or removed
            stored = self._change(self._prepare)  # another thread may have prepared them meanwhile
        return stored

    def _change(self, change: Callable[[_Stored], _Stored]) -> _Stored:
        """Stores and returns `change` of the stored rows. Threads take turns. A signal handler cannot wait for the
        thread that it interrupts: if it has stored something meanwhile, `change` is applied again, to that.
        """
        with self._lock:
            while True:
                before = self._stored
                after = change(before)
                if self._stored is before:  # no call follows in which a handler could run
                    self._stored = after
                    return after

    def __len__(self) -> int:
        return self._stored.rows.shape[0]

    def __repr__(self) -> str:
        return (
            f"FlatIPIndex({len(self)} rows of {self.dim} {self.dtype} {'streamed to' if self.streamed else 'on'} "
            f"{self.device}, {self.bytes_per_row:.0f} bytes a row)"
        )

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def dtype(self) -> str:
        return cpu.DTYPE_NAMES[self._stored.rows.dtype]

    @property
    def device(self) -> torch.device:
        """The device of searches; queries must be on it."""
        return self._device

    @property
    def streamed(self) -> bool:
        """Whether the rows stay in host memory and every search copies them to the device."""
        return self._streamed

    @property
    def bytes_per_row(self) -> float:
        """Bytes stored per row: the row, its scale, its id and its share of the packed copy."""
        rows, row_scale, ids, prepared = self._stored[:4]
        arrays = [rows, row_scale, ids, *(prepared or ())]
        return sum(array.nbytes for array in arrays if array is not None) / len(rows)

    @survives_fork
    def dequantised(self) -> Tensor:
        """A copy of the stored rows as the float32 values (N, E) that are searched."""
        stored = self._stored
        rows = stored.rows[:, : self._dim]
        return rows.clone() if rows.dtype == torch.float32 else dequantise(rows, stored.row_scale)

    @overload
    def search(self, queries: Tensor, k: int, *, allowed: Tensor | np.ndarray | None = None) -> TopK: ...
    @overload
    def search(self, queries: np.ndarray, k: int, *, allowed: Tensor | np.ndarray | None = None) -> NumpyTopK: ...
    @survives_fork
    def search(
        self, queries: Tensor | np.ndarray, k: int, *, allowed: Tensor | np.ndarray | None = None
    ) -> TopK | NumpyTopK:
        """The k rows with the largest inner product for each query, exactly as `ip_topk`.

        Args:
            queries: (..., E) float32, float16 or bfloat16, on `device`.
            k: 1 to 1024, at most the number of rows.
            allowed: the rows that may be returned, on `device`: flags (N,) bool, or the numbers (n,) int64 that
                searches return.

        Returns:
            A `TopK`, or a `NumpyTopK` for numpy queries: scores (..., k) float32, without a gradient, and indices
            (..., k) int64, best first.

        Raises:
            TypeError, ValueError: as `ip_topk`.

        Example:
            >>> index = valm_kernels.FlatIPIndex(torch.eye(8), ids=torch.arange(10, 18))
            >>> index.search(torch.eye(8)[3], k=2, allowed=torch.tensor([12, 13]))
            TopK(scores=tensor([1., 0.]), indices=tensor([13, 12]))
        """
        flat = as_tensor(queries, "queries")
        stored = self._searchable()
        rows, row_scale, ids, prepared = stored[:4]
        k = check_search(flat, len(rows), self.dim, self.device, k)
        some = None if allowed is None else self._named(allowed, stored, "allowed")
        scores, indices = search(flat, rows, row_scale, k, prepared, streamed=self._streamed, allowed=some)
        if ids is not None:
            indices = ids[indices.clamp(min=0)].masked_fill_(indices < 0, -1)
        return like_queries(queries, scores, indices)

    def _named(self, names: Tensor | np.ndarray, stored: _Stored, what: str) -> Tensor:
        """The named rows as flags (N,) bool; `names` are flags, or the numbers that searches return."""
        if stored.ids is None or str(getattr(names, "dtype", "")).endswith("bool"):
            named = allowed_rows(names, len(stored.rows), self.device, what)
            assert named is not None
            return named
        numbers = as_tensor(names, what)
        if numbers.dtype != torch.int64:
            raise TypeError(f"{what} has dtype {numbers.dtype}, expected bool (a flag a row) or int64 (row ids)")
        if numbers.dim() != 1:
            raise ValueError(f"{what} must have shape (n,), but has shape {tuple(numbers.shape)}")
        if numbers.device != self.device:
            raise ValueError(f"{what} is on {numbers.device}, the index is on {self.device}: move one of them")
        if self.device.type == "cpu":
            missing = numbers[~torch.isin(numbers, stored.ids)]
            if len(missing):
                raise ValueError(f"{what} contains {int(missing[0])}, which is not the id of a row of the index")
        return torch.isin(stored.ids, numbers)

    @survives_fork
    def add(self, vectors: Tensor | np.ndarray, ids: Tensor | np.ndarray | None = None) -> None:
        """Appends rows (M, E), numbered from `len(index)` on. If the index was built with ids, pass ids (M,) too.

        Each call copies all stored rows. On the CPU it packs only the new rows, until the index has doubled since all
        rows were packed. After that, and always on other devices, the next search prepares all rows again, which takes
        about as long as building the index.

        Raises:
            TypeError, ValueError: as the constructor, or ids are missing or not expected.
        """
        rows = as_tensor(vectors, "vectors")
        check_float(rows, "vectors")
        if rows.dim() != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"vectors must have shape (M, {self.dim}), but have shape {tuple(rows.shape)}")
        self._change(lambda stored: self._with(rows, ids, stored))

    def _with(self, rows: Tensor, ids: Tensor | np.ndarray | None, stored: _Stored) -> _Stored:
        """The stored rows followed by new float rows."""
        count = len(stored.rows)
        if count + len(rows) > MAX_ROWS:
            raise ValueError(
                f"vectors has {len(rows)} rows, but only {MAX_ROWS - count} more fit next to the {count} stored: build "
                "a second index and join results by merge_topk"
            )
        if (ids is None) != (stored.ids is None):
            expected = "must have ids too" if ids is None else "must have no ids"
            raise ValueError(f"vectors {expected}, like the rows of the index")
        all_ids = stored.ids
        if ids is not None and stored.ids is not None:
            new = distinct_ids(ids, len(rows)).to(stored.ids.device)
            all_ids = distinct_ids(torch.cat([stored.ids, new]), count + len(rows))
        rows, row_scale = store(rows, self.dtype, self._home, "vectors")
        if stored.row_scale is not None and row_scale is not None:
            row_scale = torch.cat([stored.row_scale, row_scale])
        all_rows = torch.cat([stored.rows, self._laid_out(rows)])
        prepared = None
        if isinstance(stored.prepared, cpu.PackedRows) and len(all_rows) <= GROWTH * stored.centred:
            prepared = cpu.extend(stored.prepared, count, all_rows, row_scale)
        return _Stored(all_rows, row_scale, all_ids, prepared, stored.centred)

    @survives_fork
    def remove(self, ids: Tensor | np.ndarray) -> None:
        """Removes rows, named by the numbers (n,) that searches return or by flags (N,) bool.

        Without ids, the rows after a removed row move up and change their numbers. The remaining rows are copied, and
        the next search packs them again.

        Raises:
            TypeError, ValueError: as `allowed` in `search`, or no row would stay.
        """
        self._change(lambda stored: self._without(ids, stored))

    def _without(self, ids: Tensor | np.ndarray, stored: _Stored) -> _Stored:
        rows, row_scale, row_ids = stored[:3]
        stays = ~self._named(ids, stored, "ids")
        if not stays.any():
            raise ValueError(f"all {len(rows)} rows would be removed, but an index needs at least one")
        at_home = stays.to(self._home)
        row_ids = None if row_ids is None else row_ids[stays]
        row_scale = None if row_scale is None else row_scale[at_home]
        return _Stored(rows[at_home], row_scale, row_ids, None)

    @survives_fork
    def save(self, path: str | os.PathLike) -> None:
        """Writes the folder `path`: npy files and a manifest.json with their checksums, all or nothing.

        Raises:
            OSError: the index could not be written, and the folder's old content is untouched; or the index was written
                but could not be flushed to the disk. The message says which.
        """
        from . import storage

        rows, row_scale, ids, prepared = self._searchable()[:4]
        arrays = {"rows": rows[:, : self._dim], "row_scale": row_scale, "ids": ids}
        if isinstance(prepared, cpu.PackedRows):
            arrays |= prepared._asdict()
        contents = {
            name: (array.view(torch.int16) if array.dtype == torch.bfloat16 else array).cpu().numpy()
            for name, array in arrays.items()
            if array is not None
        }
        contents["rows"] = contents["rows"].view(DTYPES[self.dtype][1])
        storage.write_folder(Path(path), contents, {"dtype": self.dtype, "count": len(rows), "dim": self.dim})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        mmap: bool = False,
        verify: bool | None = None,
        device: torch.device | str = "cpu",
        streamed: bool | None = None,
    ) -> FlatIPIndex:
        """Opens a saved index.

        Args:
            path: the folder that `save` wrote.
            mmap: memory-map the rows instead of reading them.
            verify: compare checksums, which reads every file. None does so unless `mmap`. Sizes, dtypes and shapes are
                always compared.
            device, streamed: as for the constructor.

        Raises:
            FileNotFoundError: there is no saved index.
            ValueError: the index is damaged, or its format version is not supported.
        """
        from . import storage

        while True:
            folder = storage.Folder(Path(path), mmap=mmap, verify=not mmap if verify is None else verify)
            try:
                return cls._read(folder, device, streamed)
            except storage.MissingFile:
                if not folder.replaced():
                    raise

    @classmethod
    @survives_fork
    def _read(cls, folder: storage.Folder, device: torch.device | str, streamed: bool | None) -> FlatIPIndex:
        dtype, (count, dim) = folder.dtype, folder.shape
        if dtype not in DTYPES:
            raise ValueError(f"{folder.manifest_path} is damaged: unknown dtype {dtype!r}")
        torch_dtype, file_dtype = DTYPES[dtype]
        array = folder.read("rows", file_dtype, (count, dim))
        # torch views int16, not uint16, as bfloat16
        rows = torch.from_numpy(array.view("int16") if dtype == "bfloat16" else array).view(torch_dtype)
        try:
            check_database(rows)
        except ValueError as error:
            raise ValueError(f"{folder.manifest_path} is damaged: {error}") from error
        index = cls.__new__(cls)
        index._choose_place(rows, dtype, device, streamed)
        index._dim = dim
        row_scale = row_ids = prepared = None
        if dtype == "int8":
            row_scale = torch.from_numpy(folder.read("row_scale", "<f4", (count,))).to(index._home)
        if "ids" in folder:
            try:
                row_ids = distinct_ids(folder.read("ids", "<i8", (count,)), count).to(index._device)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{folder.path} is damaged: {error}") from error
        index._pack = not index._streamed and index._device.type in PACKERS
        if index._pack and index._device.type == "cpu":
            index._pack = "codes" in folder
            prepared = _read_packed_rows(folder, count, dim) if index._pack else None
            if folder.mmap and prepared is not None and exceeds_memory(array.nbytes + prepared.codes.nbytes):
                read_at_random(array)  # a search reads all codes but few rows
        index._lock = Lock()
        index._stored = _Stored(index._laid_out(rows.to(index._home)), row_scale, row_ids, prepared, len(rows))
        return index


def _read_packed_rows(folder: storage.Folder, count: int, dim: int) -> cpu.PackedRows:
    first_rows = next_duplicate = None
    packed = count
    if "first_rows" in folder:
        first_rows = torch.from_numpy(folder.read("first_rows", "<i4", (None,)))
        next_duplicate = torch.from_numpy(folder.read("next_duplicate", "<i4", (count,)))
        packed = len(first_rows)
        for name, rows in (("first_rows", first_rows), ("next_duplicate", next_duplicate)):
            if packed == 0 or rows.min() < 0 or rows.max() >= count:
                raise ValueError(f"{folder.path} is damaged: {name} contains row numbers outside of 0 to {count - 1}")
        if packed + int(next_duplicate.count_nonzero()) != count:
            raise ValueError(f"{folder.path} is damaged: first_rows and next_duplicate do not name each row once")
    panels = -(-packed // cpu.PANEL_ROWS)
    return cpu.PackedRows(
        codes=torch.from_numpy(folder.read("codes", "|u1", (panels, -(-dim // 4), cpu.PANEL_ROWS, 4))),
        stats=torch.from_numpy(folder.read("stats", "<f4", (panels, cpu.STATS, cpu.PANEL_ROWS))),
        frame=torch.from_numpy(folder.read("frame", "<f4", (2, dim))),
        first_rows=first_rows,
        next_duplicate=next_duplicate,
    )


def store(rows: Tensor, dtype: str, device: torch.device, what: str = "database") -> tuple[Tensor, Tensor | None]:
    """Float rows (N, E) in the stored dtype, and for int8 their scales (N,).

    Raises:
        ValueError: a row is not finite as given or in the stored dtype; the message names the row.
    """
    if rows.dtype == DTYPES[dtype][0]:
        check_finite(rows, what)
        return rows.contiguous().to(device), None
    if dtype != "int8":
        stored = rows.to(DTYPES[dtype][0]).contiguous()
        check_finite(stored, f"{what}, stored as {dtype},")
        return stored.to(device), None
    check_finite(rows, what)
    codes, scale = rows.new_empty(rows.shape, dtype=torch.int8), rows.new_empty(len(rows), dtype=torch.float32)
    # in blocks: the rows may be a file that is larger than memory
    block = max(1, SCAN_VALUES // rows.shape[1])
    for part, codes_part, scale_part in zip(*(x.split(block) for x in (rows, codes, scale)), strict=True):
        scale_part.copy_(part.abs().amax(1).float() / 127)
        step = scale_part.masked_fill(scale_part == 0, 1)
        codes_part.copy_((part.float() / step[:, None]).round_().clamp_(-127, 127))
    return codes.to(device), scale.to(device)
