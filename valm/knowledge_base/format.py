"""How a knowledge base lies on disk, and the one way it is written.

    manifest.json          format, version, count, dim, dtype, normalized, clip, plan, skipped, shards
    vectors-00000.npy      (n, E) float16, memory-mapped when read
    items-00000.parquet    uri, caption, width, height; the id of a picture is its place among all of them
    thumbnails-00000.parquet   one JPEG a row; only where thumbnails were asked for
    skipped-00000.json     pictures and caption files that are damaged, with the reason; only where there were any

How it is resumed, and built on several machines, is in `valm.shards.build`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from valm.errors import ValmError
from valm.files import read_json, write_json
from valm.shards.build import DELETE, ShardedBuild, ShardFiles
from valm.shards.manifest import Manifest, ShardRecord, kinds_of
from valm_kernels.json_files import Count, PathText, Range, SchemaError, Sha256, check

if TYPE_CHECKING:
    from valm.clip import Clip

WHAT = "knowledge base"
VERSION = 2


class KnowledgeBaseShard(ShardRecord):
    """What is said of a shard; without images (count 0) it has no vectors and items."""

    count: Count
    skipped: Count


class ClipWeights(TypedDict, total=False):
    """What is said of a CLIP's files, where it is a folder; knowledge bases of earlier versions say nothing."""

    weight_files: dict[str, Sha256]


class ClipEntry(ClipWeights):
    """What is said of the CLIP that encoded the images; `source` is where it was, a folder relative to the manifest."""

    name: str
    weights_hash: str
    source: PathText | None


class KnowledgeBaseManifest(Manifest):
    """What manifest.json holds."""

    count: Count
    dim: Annotated[int, Range(1, 1 << 20)]
    dtype: Literal["float16"]
    clip: ClipEntry
    skipped: Count
    shards: list[KnowledgeBaseShard]  # type: ignore[misc]  # says more than the inherited one


class Skipped(TypedDict):
    """Something of the source that could not be read."""

    uri: str
    reason: str


ITEM_SCHEMA = pa.schema([("uri", pa.string()), ("caption", pa.string()), ("width", pa.int32()), ("height", pa.int32())])
THUMBNAIL_SCHEMA = pa.schema([("jpeg", pa.binary())])


@dataclass(frozen=True)
class Item:
    """What is known of one picture.

    uri: where it came from, relative to the source. caption: may be empty; several stand on lines of their own.
    """

    id: int
    uri: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class EncodedShard:
    """The images of one shard, encoded.

    vectors: (n, E) float, L2-normalised. items: what is known of the n images, ITEM_SCHEMA.
    thumbnails: n JPEGs, or None. skipped: {uri, reason} of each image or caption file that is damaged.
    facts: what the source adds to the record of the shard, as JSON.
    """

    vectors: np.ndarray
    items: pa.Table
    thumbnails: list[bytes] | None
    skipped: list[Skipped]
    facts: dict[str, Any] = field(default_factory=dict)


def check_kinds(folder: Path, number: int, record: KnowledgeBaseShard) -> None:
    """Raises ValmError where the record of a shard lists no files of a kind that it must have, or of an odd kind."""
    wanted = ({"vectors", "items"} if record["count"] else set()) | ({"skipped"} if record["skipped"] else set())
    kinds = kinds_of(record)
    if not wanted <= kinds <= wanted | {"thumbnails"}:
        listed = ", ".join(sorted(kinds)) or "no files"
        raise ValmError(f"the knowledge base {folder} is damaged: its shard {number} lists {listed}; make it again")


def read_skipped(file: Path) -> list[Skipped]:
    """What `write_shard` wrote of skipped images. Raises ValmError where the file is damaged."""
    found: list[Skipped] = read_json(file, "the list of skipped pictures", list[Skipped])
    return found


def clip_entry(clip: Clip, out: str | os.PathLike) -> dict[str, Any]:
    """What the manifest says of the encoder; a folder is named from `out`, so that the two can be moved together."""
    from valm.clip import weight_files  # torch and open_clip, which few readers of this module need

    entry: dict[str, Any] = {"name": clip.name, "weights_hash": clip.weights_hash, "source": clip.source}
    if clip.source is not None and Path(clip.source).is_dir():
        folder = Path(clip.source)
        entry |= {"source": Path(os.path.relpath(folder, out)).as_posix(), "weight_files": weight_files(folder)}
    return entry


def write_shard(out: Path, number: int, shard: EncodedShard) -> None:
    """Writes shard `number` of the knowledge base in `out`; without images it has no files of vectors and items."""
    files = ShardFiles(out, number)
    if shard.skipped:
        files.write("skipped", ".json", lambda path: write_json(path, shard.skipped))
    count = len(shard.items)
    if count:
        files.write_array("vectors", shard.vectors.astype(np.float16, copy=False))
        files.write("items", ".parquet", lambda path: pq.write_table(shard.items, path))
        if shard.thumbnails is not None:
            table = pa.table({"jpeg": shard.thumbnails}, schema=THUMBNAIL_SCHEMA)
            files.write("thumbnails", ".parquet", lambda path: pq.write_table(table, path))
    files.finish(count=count, skipped=len(shard.skipped), **shard.facts)


def finish_knowledge_base(build: ShardedBuild, clip: dict[str, Any], dim: int) -> None:
    """Makes the shards of `build` a knowledge base of vectors of width `dim`, encoded by `clip` (see `clip_entry`).

    Raises ValmError, and leaves nothing behind, where there is no picture in them.
    """
    shards = build.done()
    try:
        check([*shards.values()], list[KnowledgeBaseShard])
    except SchemaError as error:
        raise ValmError(f"the unfinished {WHAT} {build.out} is damaged: its record {error}; {DELETE}") from error
    for number, shard in shards.items():
        check_kinds(build.out, number, cast(KnowledgeBaseShard, shard))
    count = sum(shard["count"] for shard in shards.values())
    if count == 0:
        names = [entry["name"] for shard in shards.values() for entry in shard["files"]]
        skipped = [bad for name in names for bad in read_skipped(build.out / name)]
        build.abandon()
        if not skipped:
            raise ValmError("the source has no pictures")
        first = skipped[0]
        raise ValmError(
            f"none of the {len(skipped)} pictures could be read; the first, {first['uri']}: {first['reason']}"
        )
    build.finish(
        {
            "format": f"valm {WHAT}",
            "version": VERSION,
            "count": count,
            "dim": dim,
            "dtype": "float16",
            "normalized": True,
            "clip": clip,
            "skipped": sum(shard["skipped"] for shard in shards.values()),
        }
    )
