"""Images and captions listed in a CSV or TSV table."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from valm.errors import ValmError
from valm.knowledge_base.captions import join_captions, read_rows
from valm.knowledge_base.encode import Record, encode_records
from valm.knowledge_base.fingerprint import fingerprint_records, record_files
from valm.knowledge_base.sources import SourceShard


class TableSource:
    """The images that the rows of `table` name, in the order of the table.

    Rows without a path and images that are damaged or missing are skipped and listed (`ImageKnowledgeBase.skipped`).

    Args:
        table: a file with a header, separated by commas or tabs. Paths in it are relative to its folder, or absolute.
            Rows of the same path are one image with several captions.
        image_column, caption_column: by default the first of `IMAGE_COLUMNS` and of `CAPTION_COLUMNS` that it has.
        shard_size: images per shard. A build that was killed encodes at most one shard again.

    Raises:
        ValmError: the table is damaged, lacks a column or has no rows.
    """

    precomputed = False

    def __init__(
        self,
        table: str | os.PathLike,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        shard_size: int = 16384,
    ):
        path = Path(table)
        self.records = table_records(path, image_column, caption_column)
        if not self.records:
            raise ValmError(f"the table {path} has a header but no rows; add one for each image")
        self.shard_size = shard_size

    @property
    def count(self) -> int:
        return -(-len(self.records) // self.shard_size)

    def plan(self) -> dict[str, Any]:
        return {"source": "table", "fingerprint": fingerprint_records(self.records), "shard_size": self.shard_size}

    def files(self) -> Iterable[Path]:
        return record_files(self.records)

    def images(self) -> Iterable[Record]:
        return self.records

    def shards(self, done: dict[int, dict[str, Any]]) -> Iterable[SourceShard]:
        for start in range(0, len(self.records), self.shard_size):
            yield partial(encode_records, self.records[start : start + self.shard_size])


def table_records(table: Path, image_column: str | None = None, caption_column: str | None = None) -> list[Record]:
    """The images of a table with their captions, then records without an image for the rows that name none.

    Raises:
        ValmError: as `read_rows`.
    """
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
