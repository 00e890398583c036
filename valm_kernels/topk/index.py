"""`FlatIPIndex`: a database kept ready for exact inner product search, in memory or in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from valm_kernels.topk import storage
from valm_kernels.topk.api import TopK, like_queries, search
from valm_kernels.topk.checks import as_tensor, check_database, check_finite, check_float, check_search

# Stored dtype: torch's type, and numpy's in the file (numpy has no bfloat16).
DTYPES = {
    "float32": (torch.float32, "<f4"),
    "float16": (torch.float16, "<f2"),
    "bfloat16": (torch.bfloat16, "<u2"),
    "int8": (torch.int8, "|i1"),
}
NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}


class FlatIPIndex:
    """Exact top-K inner product search over stored rows.

    Args:
        database: (N, E) float32, float16 or bfloat16 tensor, or a numpy array (a memory-mapped one too); E from 8
            to 2048. Where dtype and device already fit, its memory is used as it is, without a copy.
        dtype: what is stored: "float32", "float16", "bfloat16" or "int8" (symmetric, one float32 scale per row;
            the search is exact over the dequantised rows). None keeps the database's own.
        device: where it is kept and searched. None keeps the database's own.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, or a row that is not finite, or not in the stored dtype.
    """

    def __init__(
        self,
        database: Tensor | np.ndarray,
        dtype: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        rows = as_tensor(database, "database")
        check_database(rows)
        check_float(rows, "database")
        dtype = NAMES[rows.dtype] if dtype is None else dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        check_finite(rows, "database")
        self._rows, self._row_scale = store(rows, dtype, torch.device(rows.device if device is None else device))

    def __len__(self) -> int:
        return self._rows.shape[0]

    def __repr__(self) -> str:
        return (
            f"FlatIPIndex({len(self)} rows of {self.dim} {self.dtype} on {self.device}, "
            f"{self.bytes_per_row} bytes a row)"
        )

    @property
    def dim(self) -> int:
        return self._rows.shape[1]

    @property
    def dtype(self) -> str:
        return NAMES[self._rows.dtype]

    @property
    def device(self) -> torch.device:
        return self._rows.device

    @property
    def bytes_per_row(self) -> int:
        """All that is kept for a row."""
        return self._rows.element_size() * self.dim + (0 if self._row_scale is None else 4)

    def search(self, queries: Tensor | np.ndarray, k: int) -> TopK:
        """The k best rows of each query (..., E), as `ip_topk` defines them.

        Raises:
            TypeError, ValueError: as `ip_topk`.
        """
        flat = as_tensor(queries, "queries")
        check_search(flat, len(self), self.dim, self.device, k)
        return like_queries(queries, *search(flat, self._rows, self._row_scale, k))

    def add(self, vectors: Tensor | np.ndarray) -> None:
        """Appends rows (M, E); they get the numbers from `len(index)` on. Copies the stored rows once.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        rows = as_tensor(vectors, "vectors")
        check_float(rows, "vectors")
        if rows.dim() != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"vectors must have shape (M, {self.dim}), but have shape {tuple(rows.shape)}")
        check_finite(rows, "vectors")
        rows, row_scale = store(rows, self.dtype, self.device)
        self._rows = torch.cat([self._rows, rows])
        if self._row_scale is not None:
            self._row_scale = torch.cat([self._row_scale, row_scale])

    def save(self, path: str | os.PathLike) -> None:
        """Writes the folder `path`: npy files and a manifest.json with their checksums, all or nothing.

        Raises:
            OSError: nothing could be written, or not all; what the folder held before is untouched.
        """
        arrays = {"rows": self._rows.view(torch.int16) if self.dtype == "bfloat16" else self._rows}
        if self._row_scale is not None:
            arrays["row_scale"] = self._row_scale
        contents = {name: array.cpu().numpy() for name, array in arrays.items()}
        contents["rows"] = contents["rows"].view(DTYPES[self.dtype][1])
        storage.write_folder(Path(path), contents, {"dtype": self.dtype, "count": len(self), "dim": self.dim})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        mmap: bool = False,
        verify: bool | None = None,
        device: torch.device | str = "cpu",
    ) -> FlatIPIndex:
        """Opens a saved index.

        Args:
            path: the folder.
            mmap: leave the rows in the file and let the system page them in as they are searched.
            verify: compare the checksums, which reads everything. None: unless mmap. Sizes, dtypes and shapes are
                always compared.
            device: where it is kept and searched.

        Raises:
            FileNotFoundError: there is no saved index.
            ValueError: it is damaged, or of a format version that this code does not read.
        """
        folder = Path(path)
        manifest = storage.read_manifest(folder)
        try:
            dtype, count, dim = manifest["dtype"], int(manifest["count"]), int(manifest["dim"])
            torch_dtype, file_dtype = DTYPES[dtype]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / storage.MANIFEST} is damaged: {error!r}") from error
        options = {"mmap": mmap, "verify": not mmap if verify is None else verify}
        rows = storage.read_array(folder, manifest, "rows", shape=(count, dim), dtype=file_dtype, **options)
        index = cls.__new__(cls)
        if dtype == "bfloat16":
            rows = rows.view(np.int16)
        index._rows = as_tensor(rows, "rows").view(torch_dtype).to(device)
        index._row_scale = None
        if dtype == "int8":
            scale = storage.read_array(folder, manifest, "row_scale", shape=(count,), dtype="<f4", **options)
            index._row_scale = as_tensor(scale, "row_scale").to(device)
        return index


def store(rows: Tensor, dtype: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Finite float rows (N, E) in the stored dtype, and for int8 their scales (N,)."""
    if dtype == "int8":
        scale = rows.abs().amax(1).float() / 127  # [N]
        step = scale.masked_fill(scale == 0, 1)
        codes = (rows.float() / step[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        return codes.to(device), scale.to(device)
    stored = rows.to(dtype=DTYPES[dtype][0]).contiguous()
    if stored.dtype != rows.dtype:
        check_finite(stored, f"database, stored as {dtype},")
    return stored.to(device), None
