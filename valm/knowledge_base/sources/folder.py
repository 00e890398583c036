"""Images in a folder, with captions beside them or in a table."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from valm.clip.read_image import unread_formats
from valm.knowledge_base.captions import CAPTION_SUFFIXES, read_captions
from valm.knowledge_base.encode import Record, encode_records
from valm.knowledge_base.fingerprint import fingerprint_records, record_files
from valm.knowledge_base.images import FolderContent, find_images
from valm.knowledge_base.sources import SourceShard


class FolderSource:
    """Every image under `folder`.

    Damaged images and caption files are skipped and listed (`ImageKnowledgeBase.skipped`). `remarks` says which other
    files were ignored.

    Args:
        captions: a table of captions; by default found as in `read_captions`.
        follow_links: also look into linked folders.
        shard_size: images per shard. A build that was killed encodes at most one shard again.

    Raises:
        ValmError: the folder is missing, has no images or cannot be read, or the table is damaged.
    """

    precomputed = False

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        captions: str | os.PathLike | None = None,
        follow_links: bool = False,
        shard_size: int = 16384,
    ):
        content = find_images(Path(folder), follow_links)
        self.records = folder_records(Path(folder), content.images, None if captions is None else Path(captions))
        self.remarks = _remarks(content, sum(not record.caption for record in self.records[: len(content.images)]))
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

    def files(self) -> Iterable[Path]:
        return record_files(self.records)

    def images(self) -> Iterable[Record]:
        return self.records

    def shards(self, done: dict[int, dict[str, Any]]) -> Iterable[SourceShard]:
        for start in range(0, len(self.records), self.shard_size):
            yield partial(encode_records, self.records[start : start + self.shard_size])


def folder_records(folder: Path, images: list[str], captions: Path | None = None) -> list[Record]:
    """`images` of `folder`, each with its caption (see `read_captions`), then records without an image for the damaged
    caption files.

    Raises:
        ValmError: as `read_captions`.
    """
    caption_of, damaged = read_captions(folder, images, captions)
    where = folder.absolute()  # another machine may have another working directory
    records = [Record(image, caption_of.get(image, ""), where / image) for image in images]
    return records + [Record(file, "", None, reason=reason) for file, reason in damaged.items()]


def _remarks(content: FolderContent, without_caption: int) -> list[str]:
    ignored = {suffix: count for suffix, count in content.ignored.items() if suffix not in (*CAPTION_SUFFIXES, ".csv")}
    remarks = []
    if ignored:
        kinds = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in sorted(ignored.items()))
        remarks.append("; ".join([f"files ignored: {kinds}", *unread_formats(ignored)]))
    if without_caption:
        remarks.append(f"{without_caption:,} of {len(content.images):,} images have no caption")
    if content.links:
        remarks.append(f"{content.links:,} linked folders not followed (--follow-links)")
    return remarks
