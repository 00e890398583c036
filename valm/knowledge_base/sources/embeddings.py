"""Precomputed CLIP embeddings in clip-retrieval's layout."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from valm.errors import ValmError
from valm.knowledge_base.format import ITEM_SCHEMA, EncodedShard, Skipped
from valm.knowledge_base.records import Encoding, Record
from valm.knowledge_base.sources import SourceShard, fingerprint_files
from valm.store.shards import Progress
from valm.text import one_line

if TYPE_CHECKING:
    from valm.clip.clip import Clip

# Rows normalised at once.
BLOCK_ROWS = 1 << 16


class EmbeddingSource:
    """The embeddings in `folder`, one shard for each file.

    They must come from the CLIP that the knowledge base is built with; only the width of the vectors can be checked.
    Vectors are L2-normalised; one that is zero or not finite is skipped and listed.

    Args:
        folder: has `img_emb/*.npy` (N, E) and `metadata/*.parquet` with the same numbers in their names. In the
            metadata, `url` or else `image_path` becomes the uri; `caption` and `width`, `height` (or `original_width`,
            `original_height`) are used if present.

    Raises:
        ValmError: files are missing or have the same number; the build raises it if they are damaged or do not fit
            together.
    """

    precomputed = True

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder).absolute()
        vectors = _by_number((folder / "img_emb").glob("*.npy"))
        metadata = _by_number((folder / "metadata").glob("*.parquet"))
        if not vectors:
            raise ValmError(f"no embeddings in {folder}; expected img_emb/*.npy and metadata/*.parquet")
        for number, file in vectors.items():
            if number not in metadata:
                wanted = f"metadata/metadata_{file.stem.split('_')[-1]}.parquet"
                raise ValmError(f"{file} has no metadata: expected {wanted}")
        for number, file in metadata.items():
            if number not in vectors:
                raise ValmError(f"{file} has no embeddings: expected img_emb/img_emb_{file.stem.split('_')[-1]}.npy")
        self.pairs = [(file, metadata[number]) for number, file in vectors.items()]

    @property
    def count(self) -> int:
        return len(self.pairs)

    def plan(self) -> dict[str, Any]:
        return {"source": "embeddings", "fingerprint": fingerprint_files(self.files())}

    def files(self) -> Iterable[Path]:
        return (file for pair in self.pairs for file in pair)

    def images(self) -> Iterable[Record]:
        raise ValmError("embeddings have no images: give the images that they were made of")

    def shards(self, done: dict[int, dict[str, Any]]) -> Iterable[SourceShard]:
        return (partial(read_embeddings, vectors, metadata) for vectors, metadata in self.pairs)


def read_embeddings(
    vector_file: Path, metadata_file: Path, clip: Clip, encoding: Encoding, progress: Progress
) -> EncodedShard:
    """The normalised vectors of `vector_file` with their metadata."""
    try:
        raw = np.load(vector_file, mmap_mode="r", allow_pickle=False)
        metadata = pq.read_table(metadata_file)
        items = _items(metadata, vector_file)
    except Exception as error:  # numpy raises many types for a damaged header, and Arrow for odd columns
        raise ValmError(f"cannot read {vector_file} and {metadata_file}: {one_line(str(error))}") from error
    dim = clip.embed_dim
    if raw.ndim != 2 or raw.shape[1] != dim or raw.dtype.kind != "f":
        raise ValmError(f"{vector_file} holds {raw.dtype} {raw.shape}, expected floats (N, {dim}) for this CLIP")
    if len(metadata) != len(raw):
        raise ValmError(f"{vector_file} has {len(raw)} vectors, but {metadata_file} {len(metadata)} rows")
    progress.begin(len(raw))
    vectors = np.empty(raw.shape, np.float16)
    good = np.empty(len(raw), bool)
    for start in range(0, len(raw), BLOCK_ROWS):
        block = raw[start : start + BLOCK_ROWS].astype(np.float32)
        norms = np.linalg.norm(block, axis=1)
        usable = np.isfinite(norms) & (norms > 0)
        good[start : start + len(block)] = usable
        vectors[start : start + len(block)] = block / np.where(usable, norms, 1)[:, None]
        progress.advance(len(block), skipped=int((~usable).sum()))
    bad = items.filter(pa.array(~good))["uri"].to_pylist()
    skipped: list[Skipped] = [{"uri": uri, "reason": "its embedding is zero or not finite"} for uri in bad]
    return EncodedShard(vectors[good], items.filter(pa.array(good)), None, skipped)


def _items(metadata: pa.Table, vector_file: Path) -> pa.Table:
    """The metadata's columns under the names of ITEM_SCHEMA; missing values are empty or 0."""

    def column(names: list[str], default: Any, type: pa.DataType) -> pa.Array:
        name = next((name for name in names if name in metadata.column_names), None)
        if name is None:
            return pa.array([default] * len(metadata), type)
        return metadata[name].cast(type).fill_null(default)

    rows = [f"{vector_file.name}/{row}" for row in range(len(metadata))]
    uri = pa.array(rows) if not {"url", "image_path"} & set(metadata.column_names) else None
    return pa.table(
        {
            "uri": column(["url", "image_path"], "", pa.string()) if uri is None else uri,
            "caption": column(["caption"], "", pa.string()),
            "width": column(["width", "original_width"], 0, pa.int32()),
            "height": column(["height", "original_height"], 0, pa.int32()),
        },
        schema=ITEM_SCHEMA,
    )


def _by_number(files: Iterable[Path]) -> dict[int, Path]:
    """The files by the number at the end of their names, 0 without one: img_emb_12.npy comes after img_emb_2.npy.

    Raises:
        ValmError: two files have one number, so it is unknown which metadata belongs to which vectors.
    """
    found: dict[int, Path] = {}
    for file in sorted(files):
        match = re.search(r"(\d+)$", file.stem)
        number = int(match[1]) if match else 0
        if number in found:
            raise ValmError(f"{found[number]} and {file.name} both have the number {number}; give each one of its own")
        found[number] = file
    return dict(sorted(found.items()))
