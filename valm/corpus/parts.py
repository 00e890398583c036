"""The documents of a corpus: text, JSON and parquet files, folders of them, and rows of a dataset.

The suffix decides the format: JSON_LINES (one object a line; a `.json` may be one array), DELIMITERS (CSV and TSV) and
`.parquet` have a text in a column. OTHER_FORMATS are not read. Anything else is UTF-8 text with one document a line.
All but parquet, which is compressed itself, may end in `.gz`. Retrieval makes a shard of each part of a corpus, which
fits into memory unless it is an array.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import json
import math
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from valm.clip.read_image import IMAGE_SUFFIXES
from valm.errors import ValmError
from valm.knowledge_base.captions import CAPTION_TABLES, has_caption_header
from valm.store.files import check_regular, exists, files_below, is_folder
from valm.text import one_line, utf8, why_no_text
from valm_kernels.json_files import short

# Size of a part in bytes of text, or in tokens: about a million tokens either way. A retrieval that was killed repeats
# at most one part.
PART_BYTES = 4 << 20
PART_TOKENS = 1 << 20
READ_ROWS = 4096
# Length of a document and of its line. Tokenizers take 140 times the memory, and abort where there is not as much.
MAX_DOCUMENT = 16 << 20
TOO_LONG = f"a document or line of more than {MAX_DOCUMENT >> 20} MiB: split it into several"
JSON_LINES = (".jsonl", ".jsonlines", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
# Suffixes of the files that are read in a folder; all but parquet also with `.gz`.
SUFFIXES = (".txt", ".text", *JSON_LINES, *DELIMITERS, ".parquet")
# What other suffixes say is no text, and what to do about it.
OTHER_FORMATS = {
    **dict.fromkeys((".html", ".htm", ".xhtml", ".xml"), "markup: save its text as .txt, one document a line"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub"), "no plain text: save its text as .txt"),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "a spreadsheet: save it as .csv"),
    **dict.fromkeys((".arrow", ".feather"), "an Arrow file: save it as .parquet"),
    **dict.fromkeys((".parq", ".pq"), "a parquet file by its name: name it .parquet"),
    ".orc": "an ORC file: save it as .parquet",
    ".ipynb": "a notebook: save its text as .txt",
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".zst"), "compressed: unpack it, or use .gz"),
}
HEAD_BYTES = 1 << 12
QUOTE = "quote fields as in RFC 4180, or save the texts as .jsonl"

Document = TypeVar("Document", str, Sequence[int])


class Part(Protocol):
    """A part of a corpus, read on demand."""

    def read(self) -> list[str] | list[Sequence[int]]:
        """Its documents, as text or as token ids."""


@dataclass(frozen=True)
class TextPart:
    """The lines of a UTF-8 text file that begin in its bytes [start, end). Each is a document; blank lines are skipped.

    In a `.gz` file, bytes count its content, which each part decompresses from the beginning.
    """

    file: Path
    start: int
    end: int

    def read(self) -> list[str]:
        """Reads the documents.

        Raises:
            ValmError: a line cannot be read, or the `.gz` is damaged.
        """
        texts = []
        with _open(self.file) as file:
            if self.start:  # a line that begins before `start` belongs to another part
                file.seek(self.start - 1)
                while (piece := file.readline(1 << 20)) and not piece.endswith(b"\n"):
                    pass
            while (begin := file.tell()) < self.end:
                line = file.readline(MAX_DOCUMENT + 1)
                try:
                    if b"\0" in line:
                        raise ValueError("it has a NUL byte, so it is no text")
                    _check_length(line)
                    text = self._document(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise _not_utf8(self.file, error, self._line(begin), begin) from error
                except ValueError as error:
                    raise ValmError(f"the corpus {self.file}, line {self._line(begin)}: {error}") from error
                if text:
                    texts.append(text)
        return texts

    def _document(self, line: str) -> str | None:
        return line.removeprefix("\ufeff").strip()

    def _line(self, begin: int) -> int:
        """The number (from 1) of the line that begins at byte `begin`."""
        number = 1
        with _open(self.file) as file:
            while file.tell() < begin:
                number += file.read(min(1 << 20, begin - file.tell())).count(b"\n")
        return number


@dataclass(frozen=True)
class JsonLinesPart(TextPart):
    """`TextPart` with a JSON object in each line and the document in its `column`; blank ones are skipped."""

    column: str

    def _document(self, line: str) -> str | None:
        line = line.removeprefix("\ufeff").strip()
        return json_document(_parsed(line), self.column) if line else None


@dataclass(frozen=True)
class JsonArrayPart:
    """A file that is one JSON array of objects, each with a document in `column`; blank ones are skipped. It is read at
    once, however large."""

    file: Path
    column: str

    def read(self) -> list[str]:
        """Reads the documents.

        Raises:
            ValmError: the file is not JSON, or an element has no text.
        """
        with _open(self.file) as file:
            content = file.read()
        try:
            rows = _parsed(content.decode("utf-8").removeprefix("\ufeff"))
        except UnicodeDecodeError as error:
            raise _not_utf8(self.file, error, content.count(b"\n", 0, error.start) + 1) from error
        except ValueError as error:
            raise ValmError(f"the corpus {self.file}: {error}") from error
        texts = []
        for number, row in enumerate(rows, 1):
            try:
                text = json_document(row, self.column)
            except ValueError as error:
                raise ValmError(f"the corpus {self.file}, element {number} of its array: {error}") from error
            if text:
                texts.append(text)
        return texts


@dataclass(frozen=True)
class CsvPart:
    """The rows in the bytes [start, end) of a CSV or TSV file, after `lines` lines, each of `fields` fields with a
    document in field number `place`; blank ones are skipped."""

    file: Path
    place: int
    fields: int
    start: int
    end: int
    lines: int

    def read(self) -> list[str]:
        """Reads the documents.

        Raises:
            ValmError: a row cannot be read, or has more or fewer fields.
        """
        texts = []
        for row, lines, _ in _csv_rows(self.file, self.start, self.end, self.lines):
            if row and len(row) != self.fields:
                raise ValmError(
                    f"the corpus {self.file}, line {lines}: the row has {len(row)} fields, but the header "
                    f"{self.fields}: {QUOTE}"
                )
            if row and row[self.place].strip():
                texts.append(row[self.place])
        return texts


@dataclass(frozen=True)
class TablePart:
    """Rows [start, stop) of a row group of a parquet file, with a text in `column`; blank ones are skipped."""

    file: Path
    column: str
    group: int
    start: int
    stop: int

    def read(self) -> list[str]:
        """Reads the documents.

        Raises:
            ValmError: the file is damaged, or a row has no text.
        """
        try:
            return self._read()
        except ValmError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValmError(f"cannot read the corpus {self.file}: {one_line(str(error))}") from error

    def _read(self) -> list[str]:
        texts: list[str] = []
        row = 0
        with pq.ParquetFile(self.file) as table:
            for batch in table.iter_batches(READ_ROWS, row_groups=[self.group], columns=[self.column]):
                if row + len(batch) > self.start:
                    wanted = batch.slice(max(0, self.start - row), self.stop - max(row, self.start))[0].to_pylist()
                    for number, text in enumerate(wanted, max(row, self.start)):
                        if text is None or len(text) > MAX_DOCUMENT:
                            wrong = TOO_LONG if text else f"{self.column!r} is null, expected a text"
                            number += sum(table.metadata.row_group(group).num_rows for group in range(self.group))
                            raise ValmError(f"the corpus {self.file}, row {number}: {wrong}")
                        if text.strip():
                            texts.append(text)
                row += len(batch)
                if row >= self.stop:
                    break
        return texts


@dataclass(frozen=True)
class DocumentsPart:
    """Documents already read, as text or as token ids."""

    documents: list[Any]

    def read(self) -> list[Any]:
        return self.documents


def read_documents(paths: Iterable[str | os.PathLike], *, column: str = "text") -> Iterator[str]:
    """The documents of files and folders, in their order; arguments and errors as in `file_parts`.

    A file's documents are in memory at once.
    """
    for part in file_parts(paths, column=column, part_bytes=1 << 62):
        yield from part.read()


def corpus_files(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """The files among `paths`; a folder is replaced by the files with SUFFIXES below it (`files_below`), sorted by path
    and without metadata of images (`_without_metadata`). Warns of files there in OTHER_FORMATS.

    Raises:
        ValmError: a path is missing or is not a regular file, or a folder has no such file.
    """
    files = []
    for path in map(Path, paths):
        path = path.absolute()  # another machine may have another working directory
        if is_folder(path):
            below = [file for name in files_below(path) if (file := path / name).is_file()]
            found = [file for file in _without_metadata(below) if _suffix(file) in SUFFIXES]
            if not found:
                raise ValmError(f"the folder {path} has no file that ends in {', '.join(SUFFIXES)}, or these and .gz")
            if skipped := [_suffix(file) for file in below if _suffix(file) in OTHER_FORMATS]:
                warnings.warn(
                    f"the folder {path} has {len(skipped)} files in formats that are not read "
                    f"({', '.join(sorted(set(skipped)))}): they are skipped",
                    stacklevel=2,
                )
            files += found
        elif exists(path):
            check_regular(path)
            files.append(path)
        else:
            raise ValmError(f"there is no corpus file {path}")
    return files


def _without_metadata(files: list[Path]) -> list[Path]:
    """`files` without each NAME.json that stands beside an image and its NAME.txt: img2dataset writes the caption into
    both, and as a document of the corpus it would be read twice."""
    suffixes: dict[tuple[Path, str], set[str]] = {}
    for file in files:
        suffixes.setdefault((file.parent, file.stem), set()).add(file.suffix.lower())

    def is_metadata(file: Path) -> bool:
        beside = suffixes[file.parent, file.stem]
        return file.suffix.lower() == ".json" and ".txt" in beside and not beside.isdisjoint(IMAGE_SUFFIXES)

    return [file for file in files if not is_metadata(file)]


def file_parts(
    paths: Iterable[str | os.PathLike], *, column: str = "text", part_bytes: int = PART_BYTES
) -> list[TextPart | JsonArrayPart | CsvPart | TablePart]:
    """The parts of files and folders (see `corpus_files`), in order.

    Args:
        column: of the text in JSON, CSV, TSV and parquet files.

    Raises:
        ValmError: a file is missing, is no text or has another format than its suffix. Reading a part raises it for a
            bad row or line; the message names the file and the line.
    """
    parts: list[TextPart | JsonArrayPart | CsvPart | TablePart] = []
    for file in corpus_files(paths):
        suffix = _suffix(file)
        if suffix in OTHER_FORMATS:
            raise ValmError(f"the corpus {file} is {OTHER_FORMATS[suffix]}")
        if suffix == ".parquet":
            if file.suffix == ".gz":
                raise ValmError(f"{file} is a compressed parquet file, which is compressed itself: gunzip it first")
            parts += _table_parts(file, column, part_bytes)
            continue
        head = _head(file)
        if reason := why_no_text(head):
            raise ValmError(f"the corpus {file} {reason}")
        if file.name in CAPTION_TABLES and suffix == ".txt" and has_caption_header(head):
            raise ValmError(
                f"the corpus {file} is a table of captions: rename it to captions.csv (captions.tsv where tabs part "
                "its columns) and name its column of texts (--column)"
            )
        if suffix == ".json" and head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            parts.append(JsonArrayPart(file, column))
            continue
        if b"\r" in head.rstrip(b"\r") and b"\n" not in head:
            raise ValmError(
                f"the corpus {file} has {'rows' if suffix in DELIMITERS else 'lines'} that end in a carriage return "
                "alone: convert them to line feeds, such as by `tr '\\r' '\\n'`"
            )
        if suffix in DELIMITERS:
            parts += _csv_parts(file, column, part_bytes)
        else:
            size = _size(file)
            for start in range(0, size, part_bytes):
                end = min(start + part_bytes, size)
                lines = JsonLinesPart(file, start, end, column) if suffix in JSON_LINES else TextPart(file, start, end)
                parts.append(lines)
    return parts


def row_documents(rows: Iterable[Mapping[str, Any]], column: str = "text") -> Iterator[str]:
    """The text in `column` of each row of a dataset (`open_dataset`, or any iterable of rows); blank ones are skipped.

    Raises:
        ValmError: a row has no text there; the message names the row.
    """
    for number, row in enumerate(rows):
        try:
            text = json_document(row, column)
        except ValueError as error:
            raise ValmError(f"the dataset, row {number}: {error}") from error
        if text:
            yield text


def document_parts(
    documents: Iterable[Document], *, part_tokens: int = PART_TOKENS, part_bytes: int = PART_BYTES
) -> Iterator[DocumentsPart]:
    """`documents` (texts or token ids), read lazily, in parts of about `part_bytes` bytes of text or `part_tokens`
    tokens.

    Raises:
        ValmError: a document is empty.
    """
    part: list[str | Sequence[int]] = []
    size = 0
    for document in documents:
        if not len(document):
            raise ValmError("the corpus has an empty document")
        if isinstance(document, str) and len(document) > MAX_DOCUMENT:
            raise ValmError(f"the corpus has {TOO_LONG}")
        if isinstance(document, str):
            document = utf8(document)
            size, limit = size + len(document.encode()), part_bytes
        else:
            size, limit = size + len(document), part_tokens
        part.append(document)
        if size >= limit:
            yield DocumentsPart(part)
            part, size = [], 0
    if part:
        yield DocumentsPart(part)


def json_document(row: Any, column: str) -> str | None:
    """The text in `column` of a JSON object; None if it is blank.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with a text in {column!r}, got {short(row)}")
    if column not in row:
        raise ValueError(f"there is no {column!r}, only {', '.join(map(str, row)) or 'an empty object'}")
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"{column!r} is {'null' if text is None else short(text)}, expected a text")
    _check_length(text)
    return utf8(text) if text.strip() else None


def _check_length(text: str | bytes) -> None:
    """Raises ValueError for a document or line longer than MAX_DOCUMENT."""
    if len(text) > MAX_DOCUMENT:
        raise ValueError(TOO_LONG)


def fingerprint(documents: list[str] | list[Sequence[int]]) -> str:
    """SHA-256 over documents as `Part.read` returns them."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode() if isinstance(document, str) else np.asarray(document, np.int32).tobytes()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _suffix(file: Path) -> str:
    """The suffix that tells a file's format: the one before `.gz`, in lower case."""
    name = file.name.lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


@contextmanager
def _open(file: Path) -> Iterator[IO[bytes]]:
    """A file's content, decompressed.

    Raises:
        ValmError: it cannot be read, on opening or while the block reads.
    """
    opener: Any = gzip.open if file.suffix.lower() == ".gz" else open
    try:
        with opener(file, "rb") as content:
            yield content
    except (OSError, EOFError, zlib.error) as error:
        raise ValmError(f"cannot read the corpus {file}: {one_line(str(error))}") from error


def _size(file: Path) -> int:
    """Bytes of a file's content."""
    if file.suffix.lower() != ".gz":
        return file.stat().st_size
    size = 0
    with _open(file) as content:
        while block := content.read(1 << 20):
            size += len(block)
    return size


def _head(file: Path) -> bytes:
    with _open(file) as content:
        return content.read(HEAD_BYTES)


def _not_utf8(file: Path, error: UnicodeDecodeError, line: int, begin: int = 0) -> ValmError:
    """The error for bytes that begin at byte `begin` of a file and are not UTF-8 in line number `line` (from 1)."""
    return ValmError(
        f"the corpus {file} is not UTF-8 text: {error.reason} in line {line}, at byte {begin + error.start}: convert "
        "it to UTF-8"
    )


def _parsed(text: str) -> Any:
    """The JSON value in `text`.

    Raises:
        ValueError: it is not JSON; the message is a sentence.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deeply") from error


def _csv_rows(file: Path, start: int, end: float, lines: int) -> Iterator[tuple[list[str], int, int]]:
    """The rows in the bytes [start, end) of a CSV or TSV file, after `lines` lines: the fields, the number of the row's
    last line (from 1), and the byte after it. Within quotes a row may have several lines.

    Raises:
        ValmError: a row cannot be read.
    """
    csv.field_size_limit(MAX_DOCUMENT)
    position = start
    with _open(file) as content:
        content.seek(start)

        def decoded() -> Iterator[str]:
            nonlocal lines, position
            while position < end and (line := content.readline(MAX_DOCUMENT + 1)):
                lines, position = lines + 1, position + len(line)
                _check_length(line)
                if b"\0" in line:
                    raise ValueError("it has a NUL byte, so it is no text")
                text = line.decode("utf-8")
                yield text if position > len(line) else text.removeprefix("\ufeff")

        try:
            for row in csv.reader(decoded(), delimiter=DELIMITERS[_suffix(file)], strict=True):
                yield row, lines, position
        except UnicodeDecodeError as error:
            raise _not_utf8(file, error, lines, position - len(error.object)) from error
        except ValueError as error:
            raise ValmError(f"the corpus {file}, line {lines}: {error}") from error
        except csv.Error as error:
            reason = TOO_LONG if "field limit" in str(error) else f"{error}: {QUOTE}"
            raise ValmError(f"the corpus {file}, line {lines}: {reason}") from error


def _csv_parts(file: Path, column: str, part_bytes: int) -> list[CsvPart]:
    parts: list[CsvPart] = []
    header: list[str] | None = None
    place = start = before = 0
    for row, lines, position in _csv_rows(file, 0, math.inf, 0):
        if header is None and not "".join(row).strip():
            continue  # a blank row before the header
        if header is None:
            header, start, before = [name.strip() for name in row], position, lines
            place = _place_of(column, header, file)
        elif position - start >= part_bytes:
            parts.append(CsvPart(file, place, len(header), start, position, before))
            start, before = position, lines
    if header is not None and position > start:
        parts.append(CsvPart(file, place, len(header), start, position, before))
    return parts


def _place_of(column: str, names: list[str], file: Path) -> int:
    """The place of the column of this name.

    Raises:
        ValmError: there is none, or several.
    """
    if column not in names:
        raise ValmError(
            f"the corpus {file} has no column {column!r}; it has {', '.join(names)}: name one by --column, or name the "
            "files instead of the folder"
        )
    if names.count(column) > 1:
        raise ValmError(f"the corpus {file} has {names.count(column)} columns {column!r}; give each its own name")
    return names.index(column)


def _table_parts(file: Path, column: str, part_bytes: int) -> list[TablePart]:
    try:
        with pq.ParquetFile(file) as table:
            schema, metadata = table.schema_arrow, table.metadata
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        raise ValmError(f"cannot read the corpus {file}: {one_line(str(error))}") from error
    _place_of(column, schema.names, file)
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValmError(f"the column {column!r} of the corpus {file} holds {kind}, expected text")
    place = metadata.schema.to_arrow_schema().names.index(column)
    parts = []
    for group in range(metadata.num_row_groups):
        rows, size = metadata.row_group(group).num_rows, metadata.row_group(group).column(place).total_uncompressed_size
        step = max(1, rows * part_bytes // max(1, size))
        parts += [TablePart(file, column, group, start, min(start + step, rows)) for start in range(0, rows, step)]
    return parts
