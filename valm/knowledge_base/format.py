"""The tables of a knowledge base, and how they are written.

    manifest.json        format, version, count, dim, dtype, normalized, clip, plan, skipped, shards
    shard-00000.arrow    a row an image: uri, caption, width, height, jpeg (a thumbnail, or null), vector (E float16).
                         The schema's metadata lists images and caption files that could not be read, with the reason

The id of an image is its row, counted over all shards. `valm.store.shards` resumes builds and runs them on several
machines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.store.files import Count, PathText, parse_json, relative_path
from valm.store.shards import Manifest, ShardedBuild, ShardRecord, column_of, read_shard, shard_file, totals

if TYPE_CHECKING:
    from valm.clip.clip import Clip

WHAT = "knowledge base"
VERSION = 3
SKIPPED_KEY = b"skipped"
# The columns of a shard except the vectors. The large types allow thumbnails of more than 2 GiB in one batch.
ITEM_SCHEMA = pa.schema(
    [
        ("uri", pa.large_string()),
        ("caption", pa.large_string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("jpeg", pa.large_binary()),
    ]
)
# The record of a shard counts these, and the manifest contains their sums.
FACTS = ("count", "skipped")


class ImageRecord(ShardRecord):
    """The record of a shard."""

    count: Count
    skipped: Count


class ClipEntry(TypedDict):
    """The CLIP that encoded the images. `source`: its folder relative to the manifest, or its name."""

    name: str
    weights_hash: str
    source: PathText | None


class KnowledgeBaseManifest(Manifest):
    """The content of manifest.json."""

    count: Count
    dim: Annotated[int, Field(ge=1, le=1 << 16)]
    dtype: Literal["float16"]
    clip: ClipEntry
    skipped: Count
    shards: list[ImageRecord]  # type: ignore[misc]  # narrower than the inherited type


class Skipped(TypedDict):
    """An entry of the source that could not be read."""

    uri: str
    reason: str


@dataclass(frozen=True)
class StoredImage:
    """The metadata of one image.

    uri: its place in the source. caption: empty, or one or several captions, one a line.
    """

    id: int
    uri: str
    caption: str
    width: int
    height: int


def vector_schema(dim: int) -> pa.Schema:
    """The column of a shard with vectors of width `dim`."""
    return pa.schema([("vector", pa.list_(pa.float16(), dim))])


def image_table(
    rows: pa.Table | Sequence[Mapping[str, Any]], vectors: np.ndarray, skipped: Sequence[Skipped]
) -> pa.Table:
    """The table of a shard.

    Args:
        rows: the n images, in columns of ITEM_SCHEMA; a column that a row lacks is null.
        vectors: (n, E) float, L2-normalised.
        skipped: the damaged images and caption files.
    """
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=ITEM_SCHEMA)
    flat = pa.array(np.ascontiguousarray(vectors, np.float16).reshape(-1))
    table = table.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
    return table.replace_schema_metadata({SKIPPED_KEY: json.dumps(skipped)})


def read_images(file: Path, dim: int, rows: int) -> pa.Table:
    """The table of a shard with vectors of width `dim`. Other arguments and errors are those of `read_shard`."""
    return read_shard(file, pa.schema([*ITEM_SCHEMA, *vector_schema(dim)]), rows, nullable=("jpeg",))


def vectors_of(table: pa.Table) -> np.ndarray:
    """The vectors (n, E) float16 of a shard, without a copy."""
    column = column_of(table, "vector")
    return column.flatten().to_numpy().reshape(-1, column.type.list_size)


def skipped_of(table: pa.Table) -> list[Skipped]:
    """The entries of a shard's source that could not be read. Raises ValueError if the list is damaged."""
    found: list[Skipped] = parse_json((table.schema.metadata or {}).get(SKIPPED_KEY, b""), list[Skipped])
    return found


def facts_of(table: pa.Table) -> dict[str, int]:
    """The facts about its table in the record of a shard."""
    return {"count": len(table), "skipped": len(skipped_of(table))}


def clip_entry(clip: Clip, out: str | os.PathLike) -> dict[str, Any]:
    """The CLIP's entry in the manifest. A folder in `source` is relative to `out`, so that CLIP and knowledge base can
    be moved together."""
    source = clip.source
    if source is not None and Path(source).is_dir():
        source = relative_path(source, out)
    return {"name": clip.name, "weights_hash": clip.weights_hash, "source": source}


def finish_knowledge_base(build: ShardedBuild, clip: dict[str, Any], dim: int) -> None:
    """Makes the shards of `build` a knowledge base of vectors of width `dim`, encoded by `clip` (see `clip_entry`).

    Raises:
        ValmError: the shards contain no images; the build is removed.
    """
    records = build.done()
    facts = totals(records.values(), FACTS)
    if facts["count"] == 0:
        tables = (read_images(shard_file(build.out, number), dim, 0) for number in records)
        first = next((bad for table in tables for bad in skipped_of(table)), None)
        build.abandon()
        if first is None:
            raise ValmError("the source has no images")
        raise ValmError(
            f"none of the {facts['skipped']} images could be read; the first, {first['uri']}: {first['reason']}"
        )
    build.finish(version=VERSION, **facts, dim=dim, dtype="float16", normalized=True, clip=clip)
