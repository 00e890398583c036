"""Captions of images: in files beside them, and in tables."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from valm.errors import ValmError
from valm.store.files import cannot_read, check_regular, is_transient
from valm.text import UNDEFINED_AS_LATIN_1, decoded, encoding_of, one_line, split_lines
from valm_kernels.json_files import short

CAPTION_SUFFIXES = (".txt", ".json")
# Suffixes of captions beside an image, in both cases: a camera or an old program writes IMAGE.TXT beside IMAGE.JPG.
SUFFIXES_BESIDE = (".txt", ".TXT", ".json", ".JSON")
CAPTION_TABLES = ("captions.csv", "captions.txt", "captions.json")
# Common column names of a table. The first that it has is read.
IMAGE_COLUMNS = ("image", "file", "filename", "file_name", "path", "uri")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentences", "description")

QUOTE = "quote fields as in RFC 4180, or write a captions.json"
# A larger file beside an image is not read as a caption.
MAX_CAPTION_BYTES = 1 << 20
# Bytes of a table that are read at once to detect its encoding.
ENCODING_CHUNK = 1 << 20


class FolderCaptions(NamedTuple):
    """The captions of a folder of images.

    Attributes:
        of_image: the caption of each image that has one, several captions on a line each.
        damaged: the damaged caption files beside images, each with the reason.
        table: the table that was read, if there is one.
        remarks: what of the table was not used.
    """

    of_image: dict[str, str]
    damaged: dict[str, str]
    table: Path | None
    remarks: list[str]


def read_captions(folder: Path, images: list[str], table: Path | None = None) -> FolderCaptions:
    """Finds the captions of images in `folder`.

    Captions are looked for in this order: `NAME.txt` beside the image; `caption` in `NAME.json` beside it (as
    img2dataset writes); a table of captions. The table is `table`, or else `captions.csv`, `captions.txt` (as in
    Flickr8k: a CSV with the header `image,caption`) or `captions.json` (an object from file name to caption or list of
    captions) in the folder. It names images by path, or by file name alone where one image has it.

    Raises:
        ValmError: the table is damaged, or has a file name alone that several images have.
    """
    tables = [folder / name for name in CAPTION_TABLES]
    if table is None:
        table = next((file for file in tables if file.is_file()), None)
    else:
        tables.append(table)
    by_name: dict[str, list[str]] = {}
    if table is not None and table.suffix == ".json":
        by_name = read_json_table(table)
    elif table is not None:
        for name, caption in read_rows(table):
            if name and caption:
                by_name.setdefault(name, []).append(caption)

    captions, damaged, used = {}, {}, False
    known, number_of = set(images), Counter(PurePosixPath(image).name for image in images)
    for image in images:
        path = folder / image
        caption = ""
        for file in map(path.with_suffix, SUFFIXES_BESIDE):
            try:
                caption = caption or (_read_caption_beside(file) if file not in tables else "")
            except ValmError:
                raise
            except ValueError as error:
                damaged[file.relative_to(folder).as_posix()] = str(error)
        name = image if image in by_name or path.name in known else path.name
        if not caption and name in by_name:
            if name != image and number_of[name] > 1:
                raise ValmError(
                    f"{name} in the caption table {table} is the name of {number_of[name]} images, such as {image}: "
                    "name them by their paths in the folder"
                )
            caption = "\n".join(by_name[name])
            used = True
        if caption:
            captions[image] = caption
    remarks = []
    if elsewhere := [name for name in by_name if name not in known and name not in number_of]:
        remarks.append(
            f"{len(elsewhere):,} of the {len(by_name):,} images that {table} names are not in {folder}, such as "
            f"{elsewhere[0]!r}: paths are relative to {folder}"
        )
    if len(elsewhere) < len(by_name) and not used:
        remarks.append(f"the captions of {table} are not used: the images that it names have captions beside them")
    return FolderCaptions(captions, damaged, table, remarks)


def parse_caption(content: bytes, suffix: str) -> str:
    """The caption in a `.txt` file, or under `caption` in a `.json` file (a text or a list of texts; img2dataset writes
    null for none), without blank lines. The encoding may be any that `valm.text.encoding_of` knows.

    Raises:
        ValueError: the JSON is damaged, its caption is no text, or the file has more than MAX_CAPTION_BYTES.
    """
    if len(content) > MAX_CAPTION_BYTES:
        raise ValueError(f"a caption file of more than {MAX_CAPTION_BYTES:,} bytes, which is skipped")
    text = decoded(content)
    if suffix == ".json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:  # RecursionError for thousands of brackets
            raise ValueError(f"a caption file that is not JSON: {error}") from error
        caption = value.get("caption") if isinstance(value, dict) else None
        if caption is None:
            return ""
        if isinstance(caption, list) and all(isinstance(line, str) for line in caption):
            return join_captions(caption)
        if not isinstance(caption, str):
            raise ValueError(f"a caption file whose 'caption' is {short(caption)}, expected a text or a list of texts")
        text = caption
    return join_captions(split_lines(text))


def join_captions(captions: Iterable[str]) -> str:
    """Joins captions, one a line, without blank ones."""
    return "\n".join(line for line in map(one_line, captions) if line)


def read_rows(
    table: Path, image_column: str | None = None, caption_column: str | None = None
) -> Iterator[tuple[str, str]]:
    """Image and caption of each row of a table with a header, separated by commas or tabs; "" if a row has none.

    By default the columns are the first of IMAGE_COLUMNS and of CAPTION_COLUMNS that the table has, ignoring case.

    Raises:
        ValmError: the table is no regular file or is damaged, lacks the columns or has one of them twice.
    """
    check_regular(table)
    try:
        with open(table, "rb") as opened:
            encoding = encoding_of(iter(partial(opened.read, ENCODING_CHUNK), b""))
        with open(table, encoding=encoding, errors=UNDEFINED_AS_LATIN_1, newline="") as file:
            header = file.readline()
            file.seek(0)
            # strict: a quote that is opened by mistake would swallow the rows up to the next one
            reader = csv.DictReader(file, delimiter=_delimiter(header), strict=True)
            image_names = IMAGE_COLUMNS if image_column is None else (image_column,)
            caption_names = CAPTION_COLUMNS if caption_column is None else (caption_column,)
            fields = reader.fieldnames or []
            image, caption = (first_of(names, fields) for names in (image_names, caption_names))
            if image is None or caption is None:
                raise ValmError(
                    f"the caption table {table} starts with {header.strip()[:60]!r}; expected a header with a column "
                    f"{' or '.join(image_names)} and a column {' or '.join(caption_names)}"
                )
            for column in (image, caption):
                if (count := [_plain(field) for field in fields].count(_plain(column))) > 1:
                    raise ValmError(
                        f"the caption table {table} has {count} columns {column.strip()!r}; give each its own name"
                    )
            while True:
                try:
                    row: dict[Any, Any] | None = next(reader, None)
                except csv.Error as error:
                    raise _damaged(table, reader, str(error)) from error
                if row is None:
                    return
                if any(field.strip() for field in row.get(None, [])):
                    raise _damaged(table, reader, "more fields than the header names")
                yield (row[image] or "").strip(), one_line(row[caption] or "")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValmError(f"cannot read the caption table {table}: {error}") from error


def _damaged(table: Path, reader: csv.DictReader[str], what: str) -> ValmError:
    return ValmError(f"the caption table {table}, line {reader.reader.line_num}: {what}: {QUOTE}")


def caption_header(head: bytes) -> list[str]:
    """The columns of a file that begins with `head`, if those of an image and a caption with common names are among
    them, else none."""
    header = split_lines(decoded(head))[0]
    fields = next(csv.reader([header], delimiter=_delimiter(header)), [])
    return [] if None in (first_of(IMAGE_COLUMNS, fields), first_of(CAPTION_COLUMNS, fields)) else fields


def _delimiter(header: str) -> str:
    return "\t" if "\t" in header else ","


def first_of(names: Iterable[str], fields: Iterable[str]) -> str | None:
    """The field with the first of `names` that there is, ignoring case and blanks around."""
    found = {_plain(field): field for field in fields}
    return next((found[_plain(name)] for name in names if _plain(name) in found), None)


def _plain(field: str) -> str:
    return field.strip().lower()


def read_json_table(table: Path) -> dict[str, list[str]]:
    """The captions of each image in a table that is JSON, an object from file name to a caption or a list of them.

    Raises:
        ValmError: it is not.
    """
    try:
        value = json.loads(decoded(table.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ValmError(f"cannot read the caption table {table}: {error}") from error
    if not isinstance(value, dict):
        raise ValmError(f"the caption table {table} holds a {type(value).__name__}; expected an object from file names")
    captions = {}
    for name, caption in value.items():
        lines = caption if isinstance(caption, list) else [caption]
        if not all(isinstance(line, str) for line in lines):
            raise ValmError(f"the caption of {name!r} in {table} is neither a string nor a list of strings")
        captions[name] = [line for line in map(one_line, lines) if line]
    return {name: lines for name, lines in captions.items() if lines}


def _read_caption_beside(file: Path) -> str:
    """`parse_caption` of a file; empty if it does not exist, which is the usual case."""
    try:
        if not file.is_file():
            return ""
        with open(file, "rb") as opened:
            content = opened.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        if is_transient(error):
            raise cannot_read(file, error.strerror) from error
        return ""
    return parse_caption(content, file.suffix.lower())
