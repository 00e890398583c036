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
    FACTS,
    ITEM_SCHEMA,
    VERSION,
    WHAT,
    KnowledgeBaseManifest,
    Skipped,
    StoredImage,
    read_images,
    skipped_of,
    vector_schema,
    vectors_of,
)
from valm.store.parts import KB, part_of
from valm.store.shards import damaged_files, open_manifest, read_shard, shard_file
from valm_kernels.memory_maps import exceeds_memory, read_ahead, read_at_random

if TYPE_CHECKING:  # opening a knowledge base should not wait for imports that only reading images needs
    from PIL import Image
    from torch import Tensor

    from valm.clip.clip import Clip

# Shards mapped at once, each at most three times. On Linux a process may have 65,530 maps.
OPEN_SHARDS = 1 << 13
# If vectors exceed the memory, only the pages of rows are read whose distance is more than this many bytes. A disk that
# reads 1.5 GB/s sequentially and 70,000 pages a second at random breaks even at 5 pages, a slower disk at more. But
# pages read singly stay in the cache, and the next search needs many of them again.
APART = 4 * mmap.PAGESIZE
# The most rows that are requested from the disk at once, and so the most shards: each shard is a map.
ROWS_AHEAD = 1 << 16
SHARDS_AHEAD = 256


class ImageKnowledgeBase:
    """A knowledge base: CLIP vectors and metadata of images, in a folder. Open it with `ImageKnowledgeBase.open`.

    Image ids are from 0 to `len(kb)` - 1. Shards are memory-mapped on use, so opening only checks the size of each file
    (`valm.knowledge_base.format` describes the files). Threads may share it and call any of its methods at once.

    Example:
        >>> kb = valm.ImageKnowledgeBase.open("kb")
        >>> len(kb), kb.dim
        (3, 16)
        >>> kb.item(0).caption
        'the blue sky'
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path.absolute()  # the working directory may change later
        self.manifest = manifest
        # the manifest's checksum, which covers the checksums of all files, identifies the knowledge base
        self.fingerprint: str = manifest["sha256"]
        self._counts = [shard["count"] for shard in manifest["shards"]]
        self._ends = np.cumsum(self._counts)
        self._table = functools.lru_cache(OPEN_SHARDS)(self._open_table)
        self._vectors = functools.lru_cache(OPEN_SHARDS)(self._open_vectors)
        self._sparse_vectors = functools.lru_cache(OPEN_SHARDS)(self._open_sparse_vectors)

    @classmethod
    def open(cls, path: str | os.PathLike) -> ImageKnowledgeBase:
        """Opens the knowledge base in the folder `path`, which `valm kb build` or `valm pictures` made.

        It checks the manifest and the size of every file. The number of a shard's rows is checked when the shard is
        first read. `verify` checks contents.

        Raises:
            OSError: a file cannot be read, is a link out of the folder or not a regular file. In a snapshot of the
                Hugging Face Hub's cache, a link may lead to a blob of that cache.
            ValmError: a check failed; the message names the file.
        """
        path = part_of(path, KB)
        return cls(path, open_manifest(path, WHAT, VERSION, "valm kb build", KnowledgeBaseManifest, FACTS))

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.path, self.fingerprint)  # another process opens the folder again

    def __len__(self) -> int:
        return self.manifest["count"]

    @property
    def dim(self) -> int:
        """E, the width of the vectors."""
        return self.manifest["dim"]

    @property
    def encoding(self) -> dict[str, int]:
        """The arguments of the `Encoding` of its images; empty for embeddings."""
        plan = self.manifest["plan"]
        return {name: plan[name] for name in ("batch_size", "thumbnails") if name in plan}

    def shard_files(self) -> list[tuple[Path, dict[str, Any]]]:
        """The file and the record of each shard."""
        return [(shard_file(self.path, number), record) for number, record in enumerate(self.manifest["shards"])]

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
        """Exact scores (n,) float32 of queries[query_ids[i]] and image ids[i] (`ip_scores`).

        Args:
            queries: (Q, E) float32, float16 or bfloat16.
            query_ids, ids: (n,) int64.

        Raises:
            IndexError: an id is out of range.
        """
        from valm_kernels import ip_scores

        out = np.empty(len(ids), np.float32)
        for places, vectors, rows in self._by_shard(ids):
            out[places] = ip_scores(queries, vectors, query_ids[places], rows).numpy()
        return out

    def vectors(self) -> np.ndarray:
        """All vectors, (N, E) float16: the memory map of a single shard, or a copy of several shards."""
        shards = list(self.shards())
        return shards[0] if len(shards) == 1 else np.concatenate(shards)

    def shards(self) -> Iterator[np.ndarray]:
        """The vectors (n, E) float16 of each shard, in order, memory-mapped, without empty shards."""
        return (self._vectors(number) for number, count in enumerate(self._counts) if count)

    def table(self, number: int) -> pa.Table:
        """Shard `number` of the manifest, memory-mapped."""
        return self._table(number)

    def item(self, id: int) -> StoredImage:
        """The metadata of image `id`.

        Raises:
            IndexError: the id is out of range.
        """
        table, row = self._row(id)
        return StoredImage(id, **{name: table[name][row].as_py() for name in ITEM_SCHEMA.names if name != "jpeg"})

    def thumbnail(self, id: int) -> Image.Image | None:
        """The thumbnail of image `id`, or None if the knowledge base stores no thumbnails.

        Raises:
            IndexError: the id is out of range.
            ValmError: the thumbnail is damaged.
        """
        from PIL import Image

        table, row = self._row(id)
        jpeg = table["jpeg"][row].as_py()
        if jpeg is None:
            return None
        try:
            small = Image.open(io.BytesIO(jpeg), formats=["JPEG"])
            small.load()
        except Exception as error:  # decoders raise many types for damaged bytes
            raise ValmError(f"{self.path} is damaged: thumbnail {id} is not a JPEG; make it again") from error
        return small

    def captioned(self) -> int:
        """The number of images with a caption. Reads all captions."""
        import pyarrow.compute as pc

        tables = map(self._table, range(len(self._counts)))
        return sum(pc.sum(pc.not_equal(table["caption"], ""), min_count=0).as_py() for table in tables)

    def skipped(self) -> Iterator[Skipped]:
        """The `uri` of every image, caption file and archive of the source that could not be read, and the `reason`."""
        for number in range(len(self._counts)):
            table = self._table(number)
            try:
                yield from skipped_of(table)
            except ValueError as error:
                raise ValmError(f"{shard_file(self.path, number)} is damaged: {error}; make it again") from error

    def check_encoder(self, clip: Clip) -> None:
        """Checks that `clip` encoded the images.

        Raises:
            ValmError: another CLIP encoded them.
        """
        built_with = self.manifest["clip"]
        if built_with["weights_hash"] != clip.weights_hash:
            raise ValmError(
                f"the knowledge base {self.path} was built with the CLIP {built_with['name']} (weights "
                f"{built_with['weights_hash'][:12]}), not with {clip.name} ({clip.weights_hash[:12]}): load that CLIP "
                f"or build the knowledge base again"
            )

    def load_clip(self, source: str | os.PathLike[str] | None = None, *, allow_download: bool = False) -> Clip:
        """Loads the CLIP that encoded the images.

        Args:
            source: the CLIP, as for `Clip.load`. None: the place that the knowledge base names.
            allow_download: download the CLIP if the knowledge base names a CLIP on a hub. Use it only if you trust the
                author of the knowledge base.

        Raises:
            ValmError: the CLIP is missing, or is another CLIP.
        """
        from valm.clip.clip import Clip

        if source is None:
            noted = self.manifest["clip"]["source"]
            if noted is None:
                raise ValmError(f"the knowledge base {self.path} does not say where its CLIP is: give its folder")
            if not os.path.isabs(noted) and os.path.isdir(self.path / noted):
                source = self.path / noted
            elif allow_download and not os.path.isdir(noted) and not noted.startswith("local-dir:"):
                source = noted
            else:
                raise ValmError(
                    f"the knowledge base {self.path} names the CLIP {noted!r}, which is not a folder there: give its "
                    "folder or name (--clip), or allow its download (--allow-download) if you trust both"
                )
        clip = Clip.load(source)
        self.check_encoder(clip)
        return clip

    def verify(self, *, progress: bool = True) -> list[str]:
        """Reads every file and returns the names of those whose content has changed."""
        return damaged_files(self.path, self.manifest, progress)

    def _by_shard(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each shard that holds some of `ids` (n,): their positions in `ids`, sorted by row, the shard's vectors,
        and their rows in the shard. The next shards are opened, and their rows requested, ahead of time.
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
            if self._exceeds_memory and len(distinct) * APART < self._counts[shard] * self._row_bytes:
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

    def _start(self, shard: int) -> int:
        return int(self._ends[shard]) - self._counts[shard]

    def _row(self, id: int) -> tuple[pa.Table, int]:
        """The shard of image `id`, and its row in the shard."""
        if not 0 <= id < len(self):
            raise IndexError(f"image ids go from 0 to {len(self) - 1}, got {id}")
        shard = int(np.searchsorted(self._ends, id, side="right"))
        return self._table(shard), id - self._start(shard)

    def _open_table(self, number: int) -> pa.Table:
        return read_images(shard_file(self.path, number), self.dim, self._counts[number])

    def _open_vectors(self, number: int) -> np.ndarray:
        # only the vectors: texts are checked when they are read, and need not come from the disk here
        return vectors_of(read_shard(shard_file(self.path, number), vector_schema(self.dim), self._counts[number]))

    def _open_sparse_vectors(self, number: int) -> np.ndarray:
        vectors = self._open_vectors(number)  # a separate map
        read_at_random(vectors)
        return vectors


def _open_again(path: Path, fingerprint: str) -> ImageKnowledgeBase:
    kb = ImageKnowledgeBase.open(path)
    if kb.fingerprint != fingerprint:
        raise ValmError(f"the knowledge base {path} has changed since another process opened it: start again")
    return kb
