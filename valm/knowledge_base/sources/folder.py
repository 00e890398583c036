"""Images in a folder, with captions beside them or in a table."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from valm.clip.read_image import unread_formats
from valm.knowledge_base.captions import CAPTION_SUFFIXES, FolderCaptions, read_captions
from valm.knowledge_base.encode import Record, encode_records
from valm.knowledge_base.fingerprint import fingerprint_records, record_files
from valm.knowledge_base.images import FolderContent, find_images
from valm.knowledge_base.sources import SourceShard

# Suffixes of tables that are no captions.csv and may hold captions, such as the metadata.jsonl of Hugging Face.
TABLE_SUFFIXES = {".csv", ".tsv", ".jsonl"}


class FolderSource:
    """Every image under `folder`.

    Damaged images and caption files are skipped and listed (`ImageKnowledgeBase.skipped`). `remarks` says which other
    files were ignored, and what of a table of captions.

    Args:
        captions: a table of captions; by default found as in `read_captions`.
        shard_size: images per shard. A build that was killed encodes at most one shard again.

    Raises:
        OSError: the folder cannot be read.
        ValmError: the folder is missing or has no images, or the table is damaged.
    """

    precomputed = False

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        captions: str | os.PathLike | None = None,
        shard_size: int = 16384,
    ):
        content = find_images(Path(folder))
        found = read_captions(Path(folder), content.images, None if captions is None else Path(captions))
        self.records = _records(Path(folder), content.images, found)
        self.remarks = _remarks(Path(folder), content, found)
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
    return _records(folder, images, read_captions(folder, images, captions))


def _records(folder: Path, images: list[str], captions: FolderCaptions) -> list[Record]:
    where = folder.absolute()  # another machine may have another working directory
    records = [Record(image, captions.of_image.get(image, ""), where / image) for image in images]
    return records + [Record(file, "", None, reason=reason) for file, reason in captions.damaged.items()]


def _remarks(folder: Path, content: FolderContent, captions: FolderCaptions) -> list[str]:
    others = content.ignored.copy()
    if captions.table is not None and captions.table.resolve().is_relative_to(folder.resolve()):
        others[captions.table.suffix.lower()] -= 1
    ignored = {suffix: count for suffix, count in others.items() if count > 0 and suffix not in CAPTION_SUFFIXES}
    remarks = []
    if ignored:
        kinds = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in sorted(ignored.items()))
        remarks.append("; ".join([f"files ignored: {kinds}", *unread_formats(ignored)]))
    remarks += captions.remarks
    if without_caption := len(content.images) - len(captions.of_image):
        remark = f"{without_caption:,} of {len(content.images):,} images have no caption"
        if not captions.of_image and not TABLE_SUFFIXES.isdisjoint(ignored):
            remark += ": if a table in the folder has them, give it as --captions TABLE (CSV, TSV or JSON)"
        remarks.append(remark)
    return remarks
