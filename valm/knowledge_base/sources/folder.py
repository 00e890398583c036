"""Images in a folder, with captions next to them or in a table, and images that a table names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from valm.clip.read_image import IMAGE_SUFFIXES, unread_formats
from valm.errors import ValmError
from valm.knowledge_base.captions import CAPTION_SUFFIXES, join_captions, read_captions, read_rows
from valm.knowledge_base.records import Record
from valm.knowledge_base.sources import record_parts
from valm.store.files import files_below
from valm.store.shards import Part


class _RecordSource:
    """Images whose records are in memory, `shard_size` in a shard."""

    precomputed = False
    kind: str

    def __init__(self, records: list[Record], shard_size: int):
        self.records = records
        self.shard_size = shard_size

    @property
    def count(self) -> int:
        return -(-len(self.records) // self.shard_size)

    def plan(self) -> dict[str, Any]:
        return {"source": self.kind, "shard_size": self.shard_size}

    def files(self) -> Iterable[Path]:
        return (record.source for record in self.records if isinstance(record.source, Path))

    def images(self) -> Iterable[Record]:
        return self.records

    def parts(self) -> Iterable[Part]:
        return record_parts(self.records, self.shard_size)


class FolderSource(_RecordSource):
    """Every image under `folder`.

    Damaged images and caption files are skipped and listed (`ImageKnowledgeBase.skipped`). `remarks` lists other files,
    which are ignored, and the number of images without a caption.

    Args:
        captions: a table of captions; by default found as in `read_captions`.
        shard_size: images per shard. A killed build encodes at most one shard again.

    Raises:
        OSError: the folder cannot be read.
        ValmError: the folder is missing or contains no images, or the table is damaged.
    """

    kind = "folder"

    def __init__(
        self, folder: str | os.PathLike, *, captions: str | os.PathLike | None = None, shard_size: int = 16384
    ):
        where = Path(folder).absolute()  # another machine may have another working directory
        content = find_images(Path(folder))
        found = read_captions(where, content.images, None if captions is None else Path(captions).absolute())
        records = [Record(image, found.of_image.get(image, ""), where / image) for image in content.images]
        damaged = [Record(file, "", None, reason=reason) for file, reason in found.damaged.items()]
        super().__init__(records + damaged, shard_size)
        if found.table is not None and found.table.is_relative_to(where):
            content.ignored[found.table.suffix.lower()] -= 1
        others = {suffix: n for suffix, n in content.ignored.items() if n > 0 and suffix not in CAPTION_SUFFIXES}
        kinds = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in sorted(others.items()))
        self.remarks = ["; ".join([f"files ignored: {kinds}", *unread_formats(others)])] if others else []
        if without := len(content.images) - len(found.of_image):
            self.remarks.append(f"{without:,} of {len(content.images):,} images have no caption")


class TableSource(_RecordSource):
    """The images that the rows of `table` name, in the order of the table.

    Rows without a path and images that are damaged or missing are skipped and listed (`ImageKnowledgeBase.skipped`).

    Args:
        table: a file with a header, separated by commas or tabs. Paths in it are relative to its folder, or absolute.
            Rows with the same path are one image with several captions.
        image_column, caption_column: by default the first of `IMAGE_COLUMNS` and of `CAPTION_COLUMNS` in the table.
        shard_size: images per shard. A killed build encodes at most one shard again.

    Raises:
        ValmError: the table is damaged, lacks a column or has no rows.
    """

    kind = "table"

    def __init__(
        self,
        table: str | os.PathLike,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        shard_size: int = 16384,
    ):
        path = Path(table)
        super().__init__(table_records(path, image_column, caption_column), shard_size)
        if not self.records:
            raise ValmError(f"the table {path} has a header but no rows: add a row for each image")


def table_records(table: Path, image_column: str | None = None, caption_column: str | None = None) -> list[Record]:
    """The images of a table with their captions, then records without an image for rows that name no image."""
    captions: dict[str, list[str]] = {}
    unnamed = []
    for number, (image, caption) in enumerate(read_rows(table, image_column, caption_column), start=1):
        if image:
            captions.setdefault(image, []).append(caption)
        else:
            unnamed.append(Record(f"{table.name}, row {number}", caption, None, reason="it names no image"))
    folder = table.absolute().parent  # another machine may have another working directory
    records = [Record(image, join_captions(lines), folder / image) for image, lines in captions.items()]
    return records + unnamed


class FolderContent(NamedTuple):
    """The content of a folder of images.

    images: sorted paths relative to the folder, with forward slashes. ignored: number of other files, by suffix.
    """

    images: list[str]
    ignored: Counter[str]


def find_images(folder: Path) -> FolderContent:
    """All images under `folder`: the files with one of IMAGE_SUFFIXES, in the order of `files_below`.

    Raises:
        OSError: the folder, or a folder below it, cannot be read.
        ValmError: the folder contains no image.
    """
    suffixes = {name: Path(name).suffix.lower() for name in files_below(folder)}
    images = [name for name, suffix in suffixes.items() if suffix in IMAGE_SUFFIXES]
    ignored = Counter(suffix for suffix in suffixes.values() if suffix not in IMAGE_SUFFIXES)
    if not images:
        unread = "".join(f"; {remark}" for remark in unread_formats(ignored))
        raise ValmError(
            f"no images in {folder}: looked for files ending in {' '.join(sorted(IMAGE_SUFFIXES))}, in folders below "
            f"it too{unread}"
        )
    return FolderContent(images, ignored)
