"""Images in a folder, with captions next to them or in a table, and images that a table names."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from valm.clip.read_image import IMAGE_SUFFIXES
from valm.errors import ValmError
from valm.knowledge_base.captions import CAPTION_TABLES, MAX_CAPTION_BYTES, join_captions, parse_rows, read_table
from valm.knowledge_base.records import Record
from valm.knowledge_base.sources import RecordSource
from valm.knowledge_base.sources.samples import Samples, no_images, picture_records
from valm.store.files import files_below
from valm_kernels.json_files import check_regular


class FolderSource(RecordSource):
    """Every image under `folder`.

    Damaged images and caption files are skipped and listed (`ImageKnowledgeBase.skipped`). `remarks` counts ignored
    files, images without a caption, and rows of the table without an image.

    Args:
        captions: a table of captions; by default `captions.csv`, `captions.txt` (as in Flickr8k: a CSV with the header
            `image,caption`) or `captions.json` in the folder, if there is one.
        shard_size: images per shard. A killed build encodes at most one shard again.

    Raises:
        OSError: the folder cannot be read.
        ValmError: the folder is missing or contains no images, or the table is damaged.
    """

    kind = "folder"

    def __init__(
        self, folder: str | os.PathLike, *, captions: str | os.PathLike | None = None, shard_size: int = 16384
    ):
        self.folder = Path(folder).absolute()  # another machine may have another working directory
        names = files_below(Path(folder))
        own = (self.folder / name for name in CAPTION_TABLES if name in names)
        table = next(own, None) if captions is None else Path(captions).absolute()
        inside = None if table is None else Path(os.path.relpath(table, self.folder)).as_posix()
        beside = [name for name in names if name not in (*CAPTION_TABLES, inside)]
        records, self.remarks = picture_records(
            Samples(beside, self._content),
            Path(folder),
            lambda image, caption: Record(image, caption, self.folder / image),
            None if table is None else read_table(table),
        )
        super().__init__(records, shard_size)
        unread = [name for name in beside if Path(name).suffix.lower() in (".csv", ".tsv")]
        if table is None and unread:
            other = shlex.quote(os.fspath(Path(folder, unread[0])))
            self.remarks.append(f"if {unread[0]} is a table of captions, give --captions {other}")

    def _content(self, name: str) -> bytes:
        """The content of a caption file."""
        if not (self.folder / name).is_file():  # opening a pipe would wait
            raise ValueError("it is not a file, or a link that leads to no file")
        with open(self.folder / name, "rb") as file:
            return file.read(MAX_CAPTION_BYTES + 1)


class TableSource(RecordSource):
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
    check_regular(table)  # opening a pipe would wait
    with open(table, "rb") as file:
        for number, (image, caption) in enumerate(parse_rows(file, table, image_column, caption_column), start=1):
            if image:
                captions.setdefault(image, []).append(caption)
            else:
                unnamed.append(Record(f"{table.name}, row {number}", caption, None, reason="it names no image"))
    folder = table.absolute().parent  # another machine may have another working directory
    records = [Record(image, join_captions(lines), folder / image) for image, lines in captions.items()]
    return records + unnamed


def find_images(folder: Path) -> list[str]:
    """All images under `folder`: the files with one of IMAGE_SUFFIXES, relative to it, in the order of `files_below`.

    Raises:
        OSError: the folder, or a folder below it, cannot be read.
        ValmError: the folder contains no image.
    """
    suffixes = {name: Path(name).suffix.lower() for name in files_below(folder)}
    images = [name for name, suffix in suffixes.items() if suffix in IMAGE_SUFFIXES]
    if not images:
        raise no_images(folder, suffixes.values())
    return images
