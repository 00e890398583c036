"""The files of a knowledge base, and writing them.

    manifest.json          format, version, count, dim, dtype, normalized, clip, plan, skipped, shards
    vectors-00000.npy      (n, E) float16, memory-mapped when read
    items-00000.parquet    uri, caption, width, height; the id of an image is its row, counted over all shards
    thumbnails-00000.parquet   one JPEG a row; only if thumbnails were asked for
    skipped-00000.json     damaged images and caption files, with the reason; only if there were any

`valm.store.shards` resumes builds and runs them on several machines.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.store.files import Count, PathText, Sha256, read_json, relative_path, write_json
from valm.store.shards import Manifest, Progress, ShardedBuild, ShardFiles, ShardRecord

if TYPE_CHECKING:
    from valm.clip.clip import Clip

WHAT = "knowledge base"
VERSION = 2


class KnowledgeBaseShard(ShardRecord):
    """A shard in the manifest; without images (count 0) it has no vectors and items."""

    count: Count
    skipped: Count


class ClipEntry(TypedDict):
    """The CLIP that encoded the images. `source`: where it was, a folder relative to the manifest; `weight_files`: the
    files of weights in that folder, none where it is no folder."""

    name: str
    weights_hash: str
    source: PathText | None
    weight_files: dict[str, Sha256]


class KnowledgeBaseManifest(Manifest):
    """The content of manifest.json."""

    count: Count
    dim: Annotated[int, Field(ge=1)]
    dtype: Literal["float16"]
    clip: ClipEntry
    skipped: Count
    shards: list[KnowledgeBaseShard]  # type: ignore[misc]  # says more than the inherited one


class Skipped(TypedDict):
    """An entry of the source that could not be read."""

    uri: str
    reason: str


ITEM_SCHEMA = pa.schema([("uri", pa.string()), ("caption", pa.string()), ("width", pa.int32()), ("height", pa.int32())])
THUMBNAIL_SCHEMA = pa.schema([("jpeg", pa.binary())])


@dataclass(frozen=True)
class Item:
    """The metadata of one image.

    uri: where it came from, relative to the source. caption: may be empty; several captions are on a line each.
    """

    id: int
    uri: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class EncodedShard:
    """The images of one shard, encoded.

    vectors: (n, E) float, L2-normalised. items: the metadata of the n images, in ITEM_SCHEMA.
    thumbnails: n JPEGs, or None. skipped: {uri, reason} of each damaged image or caption file.
    facts: what the source adds to the shard's entry in the manifest, as JSON.
    """

    vectors: np.ndarray
    items: pa.Table
    thumbnails: list[bytes] | None
    skipped: list[Skipped]
    facts: dict[str, Any] = field(default_factory=dict)


def read_skipped(file: Path) -> list[Skipped]:
    """The skipped images that `write_shard` wrote.

    Raises:
        ValmError: the file is damaged.
    """
    found: list[Skipped] = read_json(file, "the list of skipped images", list[Skipped])
    return found


def clip_entry(clip: Clip, out: str | os.PathLike) -> dict[str, Any]:
    """The encoder's entry in the manifest; a folder is relative to `out`, so that the two can be moved together."""
    from valm.clip.clip import weight_files  # imports torch and open_clip, which few users of this module need

    entry: dict[str, Any] = {"name": clip.name, "weights_hash": clip.weights_hash, "source": clip.source}
    entry["weight_files"] = {}
    if clip.source is not None and Path(clip.source).is_dir():
        folder = Path(clip.source)
        entry |= {"source": relative_path(folder, out), "weight_files": weight_files(folder)}
    return entry


def write_shard(out: Path, number: int, shard: EncodedShard) -> None:
    """Writes shard `number` of the knowledge base in `out`; without images it has no files of vectors and items."""
    import pyarrow.parquet as pq

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


def link_shard(number: int, shard: tuple[Path, dict[str, Any]], progress: Progress, *, out: Path) -> None:
    """Writes shard `number` of `out` by linking the files of a shard, (folder, record), of another knowledge base."""
    folder, record = shard
    progress.begin(record["count"])
    files = ShardFiles(out, number)
    files.link(folder, record["files"])
    files.finish(count=record["count"], skipped=record["skipped"])
    progress.advance(record["count"])


def begin_knowledge_base(out: str | os.PathLike, plan: dict[str, Any]) -> ShardedBuild:
    """The build of a knowledge base in `out`; arguments and errors as in `ShardedBuild`."""
    return ShardedBuild(out, WHAT, plan, KnowledgeBaseShard)


def finish_knowledge_base(build: ShardedBuild, clip: dict[str, Any], dim: int) -> None:
    """Makes the shards of `build` a knowledge base of vectors of width `dim`, encoded by `clip` (see `clip_entry`).

    Raises:
        ValmError: they have no images; the build is removed.
    """
    shards = build.done()
    count = sum(shard["count"] for shard in shards.values())
    if count == 0:
        names = [entry["name"] for shard in shards.values() for entry in shard["files"]]
        skipped = [bad for name in names for bad in read_skipped(build.out / name)]
        build.abandon()
        if not skipped:
            raise ValmError("the source has no images")
        first = skipped[0]
        raise ValmError(
            f"none of the {len(skipped)} images could be read; the first, {first['uri']}: {first['reason']}"
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
