"""The image knowledge base: CLIP image vectors on disk with the metadata of each image."""

from __future__ import annotations

import functools
import io
import mmap
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from valm.errors import ValmError
from valm.knowledge_base.format import (
    ITEM_SCHEMA,
    THUMBNAIL_SCHEMA,
    VERSION,
    WHAT,
    EncodedShard,
    Item,
    KnowledgeBaseManifest,
    Skipped,
    read_skipped,
)
from valm.store.files import is_transient, read_json, status
from valm.store.shards import MANIFEST_FILE, Manifest, damaged_files, open_array, open_manifest
from valm.text import one_line
from valm_kernels.memory_maps import exceeds_memory, read_ahead, read_at_random

if TYPE_CHECKING:  # so that opening a knowledge base does not wait for what reads its tables and images
    from PIL import Image
    from torch import Tensor

    from valm.clip.clip import Clip

# Shards mapped at once, each of them twice at most; a process may have 65,530 maps on Linux.
OPEN_SHARDS = 1 << 13
OPEN_TABLES = 16
# Of vectors that exceed the memory, the pages of rows that are farther apart than this many bytes are read alone. A
# disk that reads 1.5 GB/s one after the other, and 70,000 pages a second here and there, is as fast at 5 pages; a
# slower disk at more. But pages that are read alone stay in the cache, and the next search needs many of them again.
APART = 4 * mmap.PAGESIZE
# Of such rows, so many are on their way from the disk at once, from no more shards: each is a map.
ROWS_AHEAD = 1 << 16
SHARDS_AHEAD = 256


class ImageKnowledgeBase:
    """A knowledge base opened from its folder (see `valm.knowledge_base.format` for the files in it).

    Vectors are memory-mapped and items are read on use, so opening only checks the size of each file. Threads may share
    it, and any of its methods may run at once.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path.absolute()  # it stays open wherever the process works later
        self.manifest = manifest
        # the manifest's own checksum, over those of all other files: identifies the knowledge base
        self.fingerprint: str = manifest["sha256"]
        self._of_manifest = _identity(self.path)
        self._shards = manifest["shards"]
        self._ends = np.cumsum([shard["count"] for shard in self._shards])
        self._vectors = functools.lru_cache(OPEN_SHARDS)(self._open_vectors)
        self._sparse_vectors = functools.lru_cache(OPEN_SHARDS)(self._open_sparse_vectors)
        self._table = functools.lru_cache(OPEN_TABLES)(self._read_table)

    @classmethod
    def open(cls, path: str | os.PathLike) -> ImageKnowledgeBase:
        """Opens the knowledge base in folder `path`.

        Checks format, version and the size of every file. A file's header is checked when it is first read, and
        contents by `verify`.

        Raises:
            ValmError: a check failed; the message names the file.
        """
        path = Path(path)
        before = _identity(path)
        manifest = open_manifest(path, WHAT, VERSION, "valm kb build", KnowledgeBaseManifest)
        kb = cls(path, manifest)
        kb._of_manifest = before  # if it has been replaced since, the first read says so
        return kb

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.path, self.fingerprint)  # another process opens the folder itself

    def __len__(self) -> int:
        return self.manifest["count"]

    @property
    def dim(self) -> int:
        """E, the width of the vectors."""
        return self.manifest["dim"]

    @property
    def encoding(self) -> dict[str, int]:
        """How its images were encoded, as the arguments of an `Encoding`; of embeddings nothing is known."""
        plan = self.manifest["plan"]
        return {name: plan[name] for name in ("batch_size", "thumbnails") if isinstance(plan.get(name), int)}

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """Vectors of the images `ids` (n,) int64: (n, E) float16.

        Raises:
            IndexError: an id is out of range.
        """
        out = np.empty((len(ids), self.dim), np.float16)
        for places, vectors, rows in self._by_shard(ids):
            out[places] = vectors[rows]
        return out

    def scores(self, queries: Tensor, query_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Exact scores (n,) float32 of queries[query_ids[i]] and image ids[i] (`ip_scores`), for queries (Q, E) and ids
        (n,) int64.

        Raises:
            IndexError: an id is out of range.
        """
        from valm_kernels import ip_scores

        out = np.empty(len(ids), np.float32)
        for places, vectors, rows in self._by_shard(ids):
            out[places] = ip_scores(queries, vectors, query_ids[places], rows).numpy()
        return out

    def vectors(self) -> np.ndarray:
        """All vectors, (N, E) float16: the memory map of a single shard, else a copy in memory."""
        shards = list(self.shards())
        return shards[0] if len(shards) == 1 else np.concatenate(shards)

    def shards(self) -> Iterator[np.ndarray]:
        """The vectors (n, E) float16 of each shard that has images, in order, memory-mapped."""
        return (self._vectors(number) for number, shard in enumerate(self._shards) if shard["count"])

    def item(self, id: int) -> Item:
        """The metadata of image `id`.

        Raises:
            IndexError: the id is out of range.
        """
        shard, row = self._locate(id)
        items = self._table(shard, "items")
        if items is None:
            raise ValmError(f"{self.path} has no items in its shard {shard}; build the knowledge base again")
        return Item(id, **items.slice(row, 1).to_pylist()[0])

    def thumbnail(self, id: int) -> Image.Image | None:
        """The thumbnail of image `id`, or None if the knowledge base was built without.

        Raises:
            IndexError: the id is out of range.
            ValmError: the thumbnail is damaged.
        """
        from PIL import Image

        shard, row = self._locate(id)
        table = self._table(shard, "thumbnails")
        if table is None:
            return None
        try:
            small = Image.open(io.BytesIO(table["jpeg"][row].as_py()), formats=["JPEG"])
            small.load()
            return small
        except Exception as error:  # decoders raise many types for damaged bytes
            file = self._file(shard, "thumbnails")
            raise ValmError(f"{file} is damaged, row {row} is no JPEG; build the knowledge base again") from error

    def captioned(self) -> int:
        """Number of images with a caption. Reads all captions, of one shard at a time."""
        import pyarrow.compute as pc

        tables = (self._read_table(shard, "items") for shard in range(len(self._shards)))
        return sum(
            pc.sum(pc.not_equal(table["caption"], ""), min_count=0).as_py() for table in tables if table is not None
        )

    def skipped(self) -> Iterator[Skipped]:
        """`uri` and `reason` of every image, caption file and archive of the source that could not be read."""
        for shard in self._shards:
            yield from self._skipped(shard)

    def check_encoder(self, clip: Clip) -> None:
        """Checks that `clip` encoded the images.

        Raises:
            ValmError: it was another CLIP.
        """
        built_with = self.manifest["clip"]
        if built_with["weights_hash"] != clip.weights_hash:
            raise ValmError(
                f"the knowledge base {self.path} was built with the CLIP {built_with['name']} (weights "
                f"{built_with['weights_hash'][:12]}), not with {clip.name} ({clip.weights_hash[:12]}); load that CLIP "
                f"or build the knowledge base again"
            )

    def load_clip(self, source: str | os.PathLike[str] | None = None, *, allow_download: bool = False) -> Clip:
        """The CLIP that encoded the images, from where it was then, or from `source` (see `Clip.load`).

        Args:
            allow_download: download the CLIP if the knowledge base names one on a hub. Use it only if you trust whoever
                wrote the knowledge base.

        Raises:
            ValmError: the CLIP is missing or is another one.
        """
        from valm.clip.clip import Clip, weight_files

        if source is None:
            noted = self.manifest["clip"]["source"]
            if noted is None:
                raise ValmError(f"the knowledge base {self.path} does not say where its CLIP is: give its folder")
            if not os.path.isabs(noted) and os.path.isdir(self.path / noted):
                folder = self.path / noted
                self._check_weight_files(weight_files(folder), folder)
                source = folder
            elif allow_download and not os.path.isdir(noted) and not noted.startswith("local-dir:"):
                source = noted
            else:
                raise ValmError(
                    f"the knowledge base {self.path} says that its CLIP is {noted!r}, which is no folder beside it: "
                    "give its folder or name (--clip), or allow its download (--allow-download) if you trust both"
                )
        clip = Clip.load(source)
        self.check_encoder(clip)
        return clip

    def verify(self, *, progress: bool = True) -> list[str]:
        """Reads every file and returns the names of those whose content has changed."""
        return damaged_files(self.path, self.manifest, progress)

    def check_same(self) -> None:
        """Checks that the folder still holds this knowledge base: files are opened on use.

        Raises:
            ValmError: it has become another one since it was opened.
        """
        found = _identity(self.path)
        if found == self._of_manifest:
            return
        # the same manifest is written anew where a backup is restored
        if found and read_json(self.path / MANIFEST_FILE, "the manifest", Manifest)["sha256"] == self.fingerprint:
            self._of_manifest = found
        else:
            raise ValmError(f"the knowledge base {self.path} has been replaced since it was opened: open it again")

    def encoded_shard(self, number: int) -> EncodedShard:
        """Shard `number` of the manifest, as `write_shard` takes it."""
        shard = self._shards[number]
        skipped = list(self._skipped(shard))
        if not shard["count"]:
            return EncodedShard(np.empty((0, self.dim), np.float16), ITEM_SCHEMA.empty_table(), None, skipped)
        small, items = self._read_table(number, "thumbnails"), self._read_table(number, "items")
        thumbnails = None if small is None else small["jpeg"].to_pylist()
        return EncodedShard(self._open_vectors(number), items, thumbnails, skipped)

    def _check_weight_files(self, found: dict[str, str], folder: Path) -> None:
        """Compares the weight files of the CLIP in `folder` with the manifest."""
        noted = self.manifest["clip"]["weight_files"]
        changed = sorted(name for name in {*noted, *found} if noted.get(name) != found.get(name))
        if changed:
            raise ValmError(
                f"the CLIP in {folder} has other weights than when the knowledge base {self.path} was built "
                f"({one_line(changed[0])}), so they are not loaded; if you changed how they are stored, give "
                "its folder (--clip)"
            )

    def _by_shard(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each shard that holds some of `ids` (n,): their positions in `ids`, sorted by row; the shard's vectors;
        and their rows in it. The next shards are opened before, and what is to be read of them is on its way.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise IndexError(f"image ids go from 0 to {len(self) - 1}, got {ids.min()} to {ids.max()}")
        order = np.argsort(ids)
        ids = ids[order]
        shards = np.searchsorted(self._ends, ids, side="right")
        begins = np.flatnonzero(np.diff(shards, prepend=-1)).tolist()
        opened, ahead = [], 0
        for begin, end in pairwise([*begins, len(ids)]):
            shard = int(shards[begin])
            rows = ids[begin:end] - self._start(shard)
            distinct = np.unique(rows) if self._exceeds_memory else rows
            if self._exceeds_memory and len(distinct) * APART < self._shards[shard]["count"] * self._row_bytes:
                vectors = self._sparse_vectors(shard)
                read_ahead(vectors, distinct)
                ahead += len(distinct)
            else:
                vectors = self._vectors(shard)
            opened.append((order[begin:end], vectors, rows))
            if ahead >= ROWS_AHEAD or len(opened) == SHARDS_AHEAD:
                yield from opened
                opened, ahead = [], 0
        yield from opened

    @property
    def _row_bytes(self) -> int:
        return self.dim * np.dtype(np.float16).itemsize

    @functools.cached_property
    def _exceeds_memory(self) -> bool:
        return exceeds_memory(len(self) * self._row_bytes)

    def _skipped(self, entry: dict[str, Any]) -> Iterator[Skipped]:
        for file in entry["files"]:
            if file["name"].startswith("skipped-"):
                yield from read_skipped(self.path / file["name"])

    def _start(self, shard: int) -> int:
        return int(self._ends[shard]) - self._shards[shard]["count"]

    def _locate(self, id: int) -> tuple[int, int]:
        if not 0 <= id < len(self):
            raise IndexError(f"image ids go from 0 to {len(self) - 1}, got {id}")
        shard = int(np.searchsorted(self._ends, id, side="right"))
        return shard, id - self._start(shard)

    def _file(self, shard: int, kind: str) -> Path | None:
        names = (entry["name"] for entry in self._shards[shard]["files"])
        return next((self.path / name for name in names if name.startswith(f"{kind}-")), None)

    def _open_vectors(self, shard: int) -> np.ndarray:
        self.check_same()
        file = self._file(shard, "vectors")
        if file is None:
            raise ValmError(f"{self.path} has no vectors in its shard {shard}; build the knowledge base again")
        array = open_array(file, (self._shards[shard]["count"], self.dim), np.float16)
        # Python's map holds a file descriptor, and 1,024 is a common limit; Arrow's needs none once it is mapped
        with pa.memory_map(str(file)) as mapped:
            return np.frombuffer(mapped.read_buffer(), np.float16, offset=array.offset).reshape(array.shape)

    def _open_sparse_vectors(self, shard: int) -> np.ndarray:
        vectors = self._open_vectors(shard)  # a map of their own
        read_at_random(vectors)
        return vectors

    def _read_table(self, shard: int, kind: str) -> pa.Table | None:
        import pyarrow.parquet as pq

        self.check_same()
        file = self._file(shard, kind)
        if file is None:
            return None
        try:
            # pq.read_table would read a folder named a=b in the path as a column
            with pq.ParquetFile(file, memory_map=True) as opened:
                table = opened.read()
            table.validate(full=True)  # texts that are not UTF-8, for one
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
            if is_transient(error):
                raise ValmError(f"cannot read {file}: {error}") from error
            raise ValmError(f"{file} is damaged: {one_line(str(error))}; build the knowledge base again") from error
        schema = ITEM_SCHEMA if kind == "items" else THUMBNAIL_SCHEMA
        if len(table) != self._shards[shard]["count"] or not table.schema.equals(schema):
            raise ValmError(
                f"{file} is damaged: it has {len(table)} rows of {', '.join(table.schema.names)}, expected "
                f"{self._shards[shard]['count']} of {', '.join(schema.names)}; build the knowledge base again"
            )
        return table


def _identity(path: Path) -> tuple[int, ...]:
    """Another one if a manifest is written in the place of the one in folder `path`, or a link to it is changed."""
    found = status(path / MANIFEST_FILE)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) if found else ()


def _open_again(path: Path, fingerprint: str) -> ImageKnowledgeBase:
    kb = ImageKnowledgeBase.open(path)
    if kb.fingerprint != fingerprint:
        raise ValmError(f"the knowledge base {path} is another one than in the process that handed it on")
    return kb
