"""Precomputed CLIP embeddings in clip-retrieval's layout."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from valm.errors import ValmError
from valm.knowledge_base.format import ITEM_SCHEMA, Skipped, image_table
from valm.knowledge_base.records import Encoding, Record
from valm.knowledge_base.sources.webdataset import fingerprint_files
from valm.store.shards import Part, Progress
from valm.text import one_line

if TYPE_CHECKING:
    from valm.clip.clip import Clip

# Rows normalised at once.
BLOCK_ROWS = 1 << 16


class EmbeddingSource:
    """The embeddings in `folder`, one shard for each file.

    They must come from the CLIP of the knowledge base; only the width of the vectors can be checked. Vectors are
    L2-normalised. A vector that is zero or not finite is skipped and listed.

    Args:
        folder: contains `img_emb/*.npy` (N, E) and `metadata/*.parquet` with the same numbers in their names. In the
            metadata, `url` or `image_path` becomes the uri; `caption` and `width`, `height` (or `original_width`,
            `original_height`) are used if present.

    Raises:
        ValmError: files are missing, or two files have the same number. The build raises it if files are damaged or do
            not fit together.
    """

    precomputed = True

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder).absolute()
        vectors = _by_number((folder / "img_emb").glob("*.npy"))
        metadata = _by_number((folder / "metadata").glob("*.parquet"))
        if not vectors or vectors.keys() != metadata.keys():
            raise ValmError(
                f"no embeddings in {folder}, or not one file of metadata for each (numbers {list(vectors)} and "
                f"{list(metadata)}), expected img_emb/img_emb_0.npy and metadata/metadata_0.parquet, ..."
            )
        self.pairs = [(file, metadata[number]) for number, file in vectors.items()]

    @property
    def count(self) -> int:
        return len(self.pairs)

    def plan(self) -> dict[str, Any]:
        return {"source": "embeddings"}

    def files(self) -> Iterable[Path]:
        return (file for pair in self.pairs for file in pair)

    def images(self) -> Iterable[Record]:
        raise ValmError("embeddings contain no images: give the images that they were made from")

    def parts(self) -> Iterator[Part]:
        return (Part(fingerprint_files(pair), partial(read_embeddings, *pair)) for pair in self.pairs)


def read_embeddings(
    vector_file: Path, metadata_file: Path, clip: Clip, encoding: Encoding, progress: Progress
) -> pa.Table:
    """The normalised vectors of `vector_file` with their metadata."""
    try:
        raw = np.load(vector_file, mmap_mode="r", allow_pickle=False)
        items = _items(pq.read_table(metadata_file), vector_file)
    except Exception as error:  # numpy raises many types for a damaged header, and Arrow for odd columns
        raise ValmError(f"cannot read {vector_file} and {metadata_file}: {one_line(str(error))}") from error
    if raw.shape != (len(items), clip.embed_dim) or raw.dtype.kind != "f":
        raise ValmError(
            f"{vector_file} holds {raw.dtype} {raw.shape}, expected floats ({len(items)}, {clip.embed_dim}) for "
            f"this CLIP and the rows of {metadata_file}"
        )
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
    return image_table(items.filter(pa.array(good)), vectors[good], skipped)


def _items(metadata: pa.Table, vector_file: Path) -> pa.Table:
    """The metadata in the columns of ITEM_SCHEMA; missing values are empty, 0 or null."""

    def column(names: list[str], default: Any) -> pa.ChunkedArray | list[Any]:
        name = next((name for name in names if name in metadata.column_names), None)
        if name is None:
            return [default] * len(metadata)
        return metadata[name].cast(pa.scalar(default).type).fill_null(default)

    uris = column(["url", "image_path"], "")
    if isinstance(uris, list):
        uris = [f"{vector_file.name}/{row}" for row in range(len(metadata))]
    return pa.table(
        {
            "uri": uris,
            "caption": column(["caption"], ""),
            "width": column(["width", "original_width"], 0),
            "height": column(["height", "original_height"], 0),
            "jpeg": pa.nulls(len(metadata)),
        }
    ).cast(ITEM_SCHEMA)


def _by_number(files: Iterable[Path]) -> dict[int, Path]:
    """The files by the number at the end of their names, or 0. Raises ValmError if two have the same number."""
    found: dict[int, Path] = {}
    for file in sorted(files):
        number = int((re.search(r"(\d+)$", file.stem) or ["0"])[0])
        if number in found:
            raise ValmError(
                f"{found[number]} and {file.name} both have the number {number}: give each file its own number"
            )
        found[number] = file
    return dict(sorted(found.items()))
