"""Captions of images: in files beside them, and in tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from valm.errors import ValmError
from valm.store.files import cannot_read, check_regular, is_transient
from valm.text import decoded, encoding_of, one_line

CAPTION_SUFFIXES = (".txt", ".json")
# Suffixes of captions beside an image, in both cases: a camera or an old program writes IMAGE.TXT beside IMAGE.JPG.
SUFFIXES_BESIDE = (".txt", ".TXT", ".json", ".JSON")
CAPTION_TABLES = ("captions.csv", "captions.txt", "captions.json")
# Common column names of a table. The first that it has is read.
IMAGE_COLUMNS = ("image", "file", "filename", "file_name", "path", "uri")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentences", "description")

# A larger file beside an image is not read as a caption.
MAX_CAPTION_BYTES = 1 << 20
# Bytes of a table that are read at once to detect its encoding.
ENCODING_CHUNK = 1 << 20


def read_captions(folder: Path, images: list[str], table: Path | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Finds the captions of images in `folder`.

    Captions are looked for in this order: `NAME.txt` beside the image; `caption` in `NAME.json` beside it (as
    img2dataset writes); a table of captions. The table is `table`, or else `captions.csv`, `captions.txt` (as in
    Flickr8k: a CSV with the header `image,caption`) or `captions.json` (an object from file name to caption or list of
    captions) in the folder. It names images by path or by file name alone.

    Returns:
        The caption of each image that has one, several captions on a line each; and the damaged caption files beside
        images, each with the reason.

    Raises:
        ValmError: the table cannot be read.
    """
    tables = [folder / name for name in CAPTION_TABLES]
    if table is None:
        table = next((file for file in tables if file.is_file()), None)
    else:
        check_regular(table)
        tables.append(table)
    by_name: dict[str, list[str]] = {}
    if table is not None and table.suffix == ".json":
        by_name = _read_json_table(table)
    elif table is not None:
        for name, caption in read_rows(table):
            if name and caption:
                by_name.setdefault(name, []).append(caption)

    captions, damaged = {}, {}
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
        caption = caption or "\n".join(by_name.get(image) or by_name.get(path.name) or [])
        if caption:
            captions[image] = caption
    return captions, damaged


def parse_caption(content: bytes, suffix: str) -> str:
    """The caption in a `.txt` file, or under `caption` in a `.json` file (where img2dataset writes null for none),
    without blank lines. The encoding may be any that `valm.text.encoding_of` knows.

    Raises:
        ValueError: the JSON is damaged, or the file has more than MAX_CAPTION_BYTES.
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
        if not isinstance(caption, str):
            return ""
        text = caption
    return join_captions(text.splitlines())


def join_captions(captions: Iterable[str]) -> str:
    """Joins captions, one a line, without blank ones."""
    return "\n".join(line for line in map(one_line, captions) if line)


def read_rows(
    table: Path, image_column: str | None = None, caption_column: str | None = None
) -> Iterator[tuple[str, str]]:
    """Image and caption of each row of a table with a header, separated by commas or tabs; "" if a row has none.

    By default the columns are the first of IMAGE_COLUMNS and of CAPTION_COLUMNS that the table has, ignoring case.

    Raises:
        ValmError: the table cannot be read or lacks the columns.
    """
    check_regular(table)
    try:
        with open(table, "rb") as opened:
            encoding = encoding_of(iter(partial(opened.read, ENCODING_CHUNK), b""))
        with open(table, encoding=encoding, newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter="\t" if "\t" in header else ",")
            columns = {name.strip().lower(): name for name in reader.fieldnames or []}
            image_names = IMAGE_COLUMNS if image_column is None else (image_column,)
            caption_names = CAPTION_COLUMNS if caption_column is None else (caption_column,)
            image = next((columns[name.lower()] for name in image_names if name.lower() in columns), None)
            caption = next((columns[name.lower()] for name in caption_names if name.lower() in columns), None)
            if image is None or caption is None:
                raise ValmError(
                    f"the caption table {table} starts with {header.strip()[:60]!r}; expected a header with a column "
                    f"{' or '.join(image_names)} and a column {' or '.join(caption_names)}"
                )
            for row in reader:
                yield (row[image] or "").strip(), one_line(row[caption] or "")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValmError(f"cannot read the caption table {table}: {error}") from error


def _read_json_table(table: Path) -> dict[str, list[str]]:
    try:
        value = json.loads(decoded(table.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise ValmError(f"cannot read the caption table {table}: {error}") from error
    if not isinstance(value, dict):
        raise ValmError(f"the caption table {table} holds a {type(value).__name__}; expected an object from file names")
    captions = {}
    for name, caption in value.items():
        lines = caption if isinstance(caption, list) else [caption]
        if not all(isinstance(line, str) for line in lines):
            raise ValmError(f"the caption of {name!r} in {table} is neither a string nor a list of strings")
        captions[name] = [line for line in map(one_line, lines) if line]
    return captions


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
