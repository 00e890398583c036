"""Captions of images: in files next to them, and in tables."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from valm.errors import ValmError
from valm.store.files import parse_json
from valm.text import composed, one_line, split_lines
from valm_kernels.json_files import check_regular, short

CAPTION_SUFFIXES = (".txt", ".json")
CAPTION_TABLES = ("captions.csv", "captions.txt", "captions.json")
# Common column names of a table. The first one in the table is read.
IMAGE_COLUMNS = ("image", "file", "filename", "file_name", "path", "uri")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentences", "description")
TABLE_REMEDY = "In a spreadsheet, save it as CSV UTF-8, comma separated. Quote fields with commas or quotes (RFC 4180)"
# A larger file next to an image is not read as a caption.
MAX_CAPTION_BYTES = 1 << 20


class CaptionTable(NamedTuple):
    """A table of captions.

    Attributes:
        path: the table, for messages.
        rows: the captions of each name, which is composed (`composed`).
    """

    path: Path
    rows: dict[str, list[str]]

    def add_to(self, images: dict[str, str]) -> list[str]:
        """Adds the captions of the `images` that have none. A row names an image by its path, or by one of `_names` if
        only one image has it.

        Returns:
            The name in each row that names no image.

        Raises:
            ValmError: the table names an image by a name that several images have.
        """
        paths = {image: composed(image) for image in images}
        known, used = set(paths.values()), set()
        images_of = Counter(name for path in paths.values() for name in _names(path) if name not in known)
        for image, path in paths.items():
            others = (name for name in _names(path) if name in self.rows and name not in known)
            name = path if path in self.rows else next(others, path)
            used.add(name)
            if images[image] or name not in self.rows:
                continue
            if images_of[name] > 1:
                raise ValmError(
                    f"{name} in the caption table {self.path} is the name of {images_of[name]} images, such as "
                    f"{image}: name images by their paths in the folder"
                )
            images[image] = "\n".join(self.rows[name])
        return [name for name, captions in self.rows.items() if name not in used for _ in captions]


def _names(path: str) -> dict[str, None]:
    """The file name of an image, and path and file name without the suffix, as catalogues of collections have them."""
    file = PurePosixPath(path)
    return dict.fromkeys((file.name, str(file.with_suffix("")), file.stem))


def parse_caption(content: bytes, suffix: str) -> str:
    """The caption in a `.txt` file, or in a `.json` file under the first of CAPTION_COLUMNS in it, without blank lines.
    In JSON a caption is a text, a list of texts, or null (img2dataset's sign for no caption).

    Raises:
        ValueError: the file is not UTF-8 or JSON, its caption is not a text, or it exceeds MAX_CAPTION_BYTES.
    """
    if len(content) > MAX_CAPTION_BYTES:
        raise ValueError(f"a caption file of more than {MAX_CAPTION_BYTES:,} bytes is skipped")
    text = content.decode("utf-8-sig")
    if suffix != ".json":
        return join_captions(split_lines(text))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError for thousands of brackets
        raise ValueError(f"a caption file that is not JSON: {error}") from error
    name = first_of(CAPTION_COLUMNS, value) if isinstance(value, dict) else None
    caption = None if name is None else value[name]
    captions = split_lines(caption) if isinstance(caption, str) else caption or []
    if not isinstance(captions, list) or not all(isinstance(line, str) for line in captions):
        raise ValueError(f"a caption file whose {name!r} is {short(caption)}, expected a text or a list of texts")
    return join_captions(captions)


def join_captions(captions: Iterable[str]) -> str:
    """Joins captions, one a line, without blank captions."""
    return "\n".join(line for line in map(one_line, captions) if line)


def read_table(table: Path) -> CaptionTable:
    """The table of captions in a file (`parse_table`).

    Raises:
        OSError: the table cannot be read or is not a regular file.
        ValmError: the table is damaged.
    """
    check_regular(table)  # opening a pipe would wait
    with open(table, "rb") as file:
        return parse_table(file, table)


def parse_table(file: BinaryIO, table: Path) -> CaptionTable:
    """The table in `file`: CSV or TSV (`parse_rows`), or JSON, an object from file name to a caption or a list of
    captions. `table` names it. Raises ValmError if the table is damaged."""
    found: dict[str, list[str]] = {}
    if table.suffix != ".json":
        for image, caption in parse_rows(file, table):
            if caption:
                found.setdefault(composed(image), []).append(caption)
        return CaptionTable(table, found)
    try:
        content = parse_json(file.read().removeprefix(codecs.BOM_UTF8), dict[str, str | list[str]])
    except ValueError as error:
        raise ValmError(
            f"the caption table {table} is not an object from file names to a caption or a list of captions: {error}"
        ) from error
    for image, captions in content.items():
        found[composed(image)] = [
            line for line in map(one_line, [captions] if isinstance(captions, str) else captions) if line
        ]
    return CaptionTable(table, found)


def parse_rows(
    file: BinaryIO, table: Path, image_column: str | None = None, caption_column: str | None = None
) -> Iterator[tuple[str, str]]:
    """Image and caption of each row of a table with a header, separated by commas or tabs; "" for an empty field.

    By default the columns are the first of IMAGE_COLUMNS and of CAPTION_COLUMNS in the table, ignoring case.

    Raises:
        ValmError: the table is damaged or lacks the columns.
    """
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        header = lines.readline()
        # strict: a quote opened by mistake would swallow the rows up to the next quote
        delimiter = "\t" if "\t" in header else ","
        reader = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
        image_names, caption_names = (
            names if column is None else (column,)
            for names, column in ((IMAGE_COLUMNS, image_column), (CAPTION_COLUMNS, caption_column))
        )
        image, caption = (first_of(names, reader.fieldnames or []) for names in (image_names, caption_names))
        if image is None or caption is None:
            raise ValmError(
                f"the caption table {table} starts with {header.strip()[:60]!r}, expected a header with a column "
                f"{' or '.join(image_names)} and a column {' or '.join(caption_names)}. {TABLE_REMEDY}"
            )
        for row in reader:
            if any(field.strip() for field in row.get(None, [])):
                raise csv.Error(f"line {reader.line_num} has more fields than the header names")
            yield (row[image] or "").strip(), one_line(row[caption] or "")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValmError(f"cannot read the caption table {table}: {error}. {TABLE_REMEDY}") from error


def first_of(names: Iterable[str], fields: Iterable[str]) -> str | None:
    """The first of `names` that is in `fields`, as it stands there, ignoring case and surrounding blanks."""
    found = {field.strip().lower(): field for field in fields}
    return next((found[name.lower()] for name in names if name.lower() in found), None)
