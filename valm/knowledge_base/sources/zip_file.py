"""A zip file of images, as people have them: a folder that was packed, or photos that Google Takeout exported."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

from valm.knowledge_base.captions import CAPTION_TABLES, MAX_CAPTION_BYTES, CaptionTable, parse_table, read_table
from valm.knowledge_base.records import Record, open_zip, read_member
from valm.knowledge_base.sources import RecordSource
from valm.knowledge_base.sources.samples import Samples, picture_records

# A larger table of captions in a zip is not read.
MAX_TABLE_BYTES = 1 << 30


class ZipSource(RecordSource):
    """Every image in a zip file, which is read as the folder that it contains (`FolderSource`).

    Nothing is unpacked, so any names in it are safe. Folders that contain everything else are left out of the names of
    the images, and so are hidden files, such as those in __MACOSX.

    Args:
        file: the zip file.
        captions: a table of captions; by default the `captions.csv`, `captions.txt` or `captions.json` in it.
        shard_size: images per shard. A killed build encodes at most one shard again.

    Raises:
        OSError: the file cannot be read.
        ValmError: the file is no zip file, is damaged or contains no images, or the table is damaged.
    """

    kind = "zip"

    def __init__(self, file: str | os.PathLike, *, captions: str | os.PathLike | None = None, shard_size: int = 16384):
        self.file = Path(file).absolute()  # another machine may have another working directory
        self.members = _members(self.file)
        own = next((name for name in CAPTION_TABLES if name in self.members), None)
        beside = [name for name in self.members if name not in CAPTION_TABLES]
        table: CaptionTable | None = None
        if captions is not None:
            table = read_table(Path(captions))
        elif own is not None:
            table = parse_table(io.BytesIO(self._content(own, MAX_TABLE_BYTES)), self.file / own)
        records, self.remarks = picture_records(Samples(beside, self._content), self.file, self._record, table)
        super().__init__(records, shard_size)

    def files(self) -> Iterable[Path]:
        return [self.file]

    def _content(self, name: str, most: int = MAX_CAPTION_BYTES) -> bytes:
        return read_member(self.file, self.members[name].filename, most)

    def _record(self, name: str, caption: str) -> Record:
        member = self.members[name]
        return Record(name, caption, self.file, size=member.file_size, member=member.filename)


def _members(file: Path) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip by their names in the innermost folder that contains all of them, sorted."""
    found = {}
    for member in open_zip(file).infolist():
        parts = member.filename.replace("\\", "/").split("/")  # some programs of Windows write backslashes
        if not member.is_dir() and not any(part.startswith(".") for part in parts):
            found[tuple(parts)] = member
    common = len(os.path.commonprefix([parts[:-1] for parts in found]))  # noqa: RUF071  # it compares items of lists
    return dict(
        sorted((("/".join(parts[common:]), member) for parts, member in found.items()), key=lambda named: named[0])
    )
