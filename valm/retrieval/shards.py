"""How a knowledge base lies on disk, and the one way it is written.

    manifest.json          format, version, count, dim, dtype, normalized, clip, plan, skipped, shards
    vectors-00000.npy      (n, E) float16, memory-mapped when read
    items-00000.parquet    id, uri, caption, width, height
    thumbnails-00000.parquet   one JPEG a row; only where thumbnails were asked for
    skipped-00000.json     pictures that could not be read, with the reason; only where there were any

While it is being built, `build.json` stands in place of the manifest and lists the shards that are whole.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from valm.errors import ValmError
from valm.files import atomic_path, read_json, writable_folder, write_json
from valm.retrieval.clip import Clip

FORMAT = "valm image knowledge base"
VERSION = 1
MANIFEST_FILE = "manifest.json"
BUILD_FILE = "build.json"

# Columns of the items of a piece; on disk `id` stands before them.
ITEM_SCHEMA = pa.schema([("uri", pa.string()), ("caption", pa.string()), ("width", pa.int32()), ("height", pa.int32())])


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


class Piece(NamedTuple):
    """A fixed part of the source (some pictures, one tar file), encoded.

    vectors: (n, E) float, L2-normalised. items: what is known of the n pictures, ITEM_SCHEMA.
    thumbnails: n JPEGs, or None. skipped: {uri, reason} of each picture that could not be read.
    """

    vectors: np.ndarray
    items: pa.Table
    thumbnails: list[bytes] | None
    skipped: list[dict[str, str]]


def clip_entry(clip: Clip, out: str | os.PathLike) -> dict[str, str | None]:
    """What the manifest says of the encoder; a folder is named from `out`, so that the two can be moved together."""
    source = clip.source
    if source is not None and Path(source).is_dir():
        source = Path(os.path.relpath(source, out)).as_posix()
    return {"name": clip.name, "weights_hash": clip.weights_hash, "source": source}


def file_entry(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file, as the manifest lists it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


class KnowledgeBaseWriter:
    """Writes a knowledge base piece by piece, so that a build killed at any point goes on where it was.

    out: folder to write; new, empty, or holding the unfinished build of the same plan.
    plan: everything the result depends on, as JSON: a build goes on only under the plan it was begun with.
    clip: the encoder, as `clip_entry` describes it; dim: width of its vectors.

    `pieces_done` says how many pieces of the source are on disk already.
    Raises ValmError where `out` holds something else or cannot be written.
    """

    def __init__(self, out: str | os.PathLike, plan: dict[str, Any], clip: dict[str, str | None], dim: int):
        self.out = writable_folder(out)
        self.plan = plan
        self.clip = clip
        self.dim = dim
        self.pieces_done = 0
        self.skipped = 0
        self.shards: list[dict[str, Any]] = []
        self.finished = (self.out / MANIFEST_FILE).exists()
        if self.finished:
            manifest = read_json(self.out / MANIFEST_FILE, "the manifest")
            if manifest.get("plan") != plan:
                raise ValmError(
                    f"{self.out} already holds a knowledge base of other pictures or settings; choose another folder"
                )
            (self.out / BUILD_FILE).unlink(missing_ok=True)  # killed between the two last steps
        elif (self.out / BUILD_FILE).exists():
            state = read_json(self.out / BUILD_FILE, "the state of an unfinished build")
            if state.get("plan") != plan:
                raise ValmError(
                    f"{self.out} holds an unfinished build of other pictures or settings; delete it or choose "
                    f"another folder"
                )
            self.pieces_done, self.skipped, self.shards = state["pieces_done"], state["skipped"], state["shards"]
        else:
            others = sorted(file.name for file in self.out.iterdir() if file.suffix != ".tmp")
            if others:
                raise ValmError(f"the output folder {self.out} is not empty (it has {others[0]}); choose another")
            self._save_state()

    @property
    def count(self) -> int:
        """Pictures written so far."""
        return sum(shard["count"] for shard in self.shards)

    def add_piece(self, piece: Piece) -> None:
        """Writes the next piece of the source: one shard, or none where none of its pictures could be read."""
        number = f"{self.pieces_done:05d}"
        files = []
        if piece.skipped:
            files.append(self._write_json(f"skipped-{number}.json", piece.skipped))
        count = len(piece.items)
        if count:
            with atomic_path(self.out / f"vectors-{number}.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, piece.vectors.astype(np.float16, copy=False))
            files.append(file_entry(self.out / f"vectors-{number}.npy"))
            ids = pa.array(range(self.count, self.count + count), pa.int64())
            files.append(self._write_table(f"items-{number}.parquet", piece.items.add_column(0, "id", ids)))
            if piece.thumbnails is not None:
                table = pa.table({"jpeg": pa.array(piece.thumbnails, pa.binary())})
                files.append(self._write_table(f"thumbnails-{number}.parquet", table))
        self.shards.append({"count": count, "files": files})
        self.skipped += len(piece.skipped)
        self.pieces_done += 1
        self._save_state()

    def finish(self) -> None:
        """Writes the manifest: from here on the folder is a knowledge base. Raises ValmError if it is empty."""
        if self.count == 0:
            names = [entry["name"] for shard in self.shards for entry in shard["files"]]
            skipped = [bad for name in names for bad in read_json(self.out / name, "the list of skipped pictures")]
            for name in [BUILD_FILE, *names]:
                (self.out / name).unlink()
            if not skipped:
                raise ValmError("the source has no pictures")
            first = skipped[0]
            raise ValmError(
                f"none of the {len(skipped)} pictures could be read; the first, {first['uri']}: {first['reason']}"
            )
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "count": self.count,
            "dim": self.dim,
            "dtype": "float16",
            "normalized": True,
            "clip": self.clip,
            "plan": self.plan,
            "skipped": self.skipped,
            "shards": self.shards,
        }
        write_json(self.out / MANIFEST_FILE, manifest)
        (self.out / BUILD_FILE).unlink()
        self.finished = True

    def _save_state(self) -> None:
        state = {"plan": self.plan, "pieces_done": self.pieces_done, "skipped": self.skipped, "shards": self.shards}
        write_json(self.out / BUILD_FILE, state)

    def _write_table(self, name: str, table: pa.Table) -> dict[str, Any]:
        with atomic_path(self.out / name) as temporary:
            pq.write_table(table, temporary)
        return file_entry(self.out / name)

    def _write_json(self, name: str, value: Any) -> dict[str, Any]:
        write_json(self.out / name, value)
        return file_entry(self.out / name)
