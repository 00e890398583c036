"""Images in a folder, with captions beside them or in a table."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from valm.knowledge_base.captions import read_captions
from valm.knowledge_base.encode import Record, encode_records
from valm.knowledge_base.fingerprint import fingerprint_records
from valm.knowledge_base.images import find_images
from valm.knowledge_base.sources import SourceShard


class FolderSource:
    """Every image under `folder`.

    Args:
        captions: a table of captions; without it they are looked for as `read_captions` says.
        shard_size: images in a shard. A killed build encodes at most one shard again.

    Damaged images and caption files are skipped and listed (`ImageKnowledgeBase.skipped`).
    Raises ValmError for a folder that is missing, has no images or cannot be read, and for a damaged table.
    """

    precomputed = False

    def __init__(
        self, folder: str | os.PathLike, *, captions: str | os.PathLike | None = None, shard_size: int = 16384
    ):
        self.records = folder_records(Path(folder), None if captions is None else Path(captions))
        self.shard_size = shard_size

    @property
    def count(self) -> int:
        return -(-len(self.records) // self.shard_size)

    def plan(self) -> dict[str, Any]:
        return {
            "source": "folder",
            "fingerprint": fingerprint_records(self.records),
            "shard_size": self.shard_size,
        }

    def shards(self, done: dict[int, dict[str, Any]]) -> Iterable[SourceShard]:
        for start in range(0, len(self.records), self.shard_size):
            yield partial(encode_records, self.records[start : start + self.shard_size])


def folder_records(folder: Path, captions: Path | None = None) -> list[Record]:
    """Every image under `folder`, with its caption (see `read_captions`); after them, without an image, the damaged
    caption files. Raises ValmError as `find_images` and `read_captions` do."""
    images = find_images(folder)
    caption_of, damaged = read_captions(folder, images, captions)
    where = folder.absolute()  # another machine has another working directory
    records = [Record(image, caption_of.get(image, ""), where / image) for image in images]
    return records + [Record(file, "", None, reason=reason) for file, reason in damaged.items()]
