"""The documents of a corpus: text, JSON and parquet files, folders of them, and rows of a dataset.

The suffix decides the format: `.jsonl`, `.ndjson` and `.json` (one object a line; a `.json` may be one array) and
`.parquet` have a text in a column; anything else is UTF-8 text with one document a line. All but parquet, which is
compressed itself, may end in `.gz`. Retrieval makes a shard of each part of a corpus, which fits into memory unless it
is an array.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from valm.errors import ValmError
from valm.files import check_regular
from valm.text import one_line, utf8
from valm_kernels.json_files import short

# Size of a part in bytes of text, or in tokens: about a million tokens either way. A retrieval that was killed repeats
# at most one part.
PART_BYTES = 4 << 20
PART_TOKENS = 1 << 20
READ_ROWS = 4096
JSON_LINES = (".jsonl", ".ndjson", ".json")
# Suffixes of the files that are read in a folder; all but parquet also with `.gz`.
SUFFIXES = (".txt", ".text", *JSON_LINES, ".parquet")

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
                file.readline()
            while (begin := file.tell()) < self.end:
                line = file.readline()
                try:
                    text = self._document(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise ValmError(
                        f"the corpus {self.file} is not UTF-8 text: {error.reason} in line {self._line(begin)}, "
                        f"at byte {begin + error.start}"
                    ) from error
                except ValueError as error:
                    raise ValmError(f"the corpus {self.file}, line {self._line(begin)}: {error}") from error
                if text:
                    texts.append(text)
        return texts

    def _document(self, line: str) -> str | None:
        return line.strip()

    def _line(self, begin: int) -> int:
        """The number (from 1) of the line that begins at byte `begin`."""
        number = 1
        with _open(self.file) as file:
            while file.tell() < begin:
                number += file.read(min(1 << 20, begin - file.tell())).count(b"\n")
        return number


@dataclass(frozen=True)
class JsonLinesPart(TextPart):
    """`TextPart` with a JSON object in each line and the document in its `column`; null and blank ones are skipped."""

    column: str

    def _document(self, line: str) -> str | None:
        line = line.removeprefix("\ufeff").strip()
        return json_document(_parsed(line), self.column) if line else None


@dataclass(frozen=True)
class JsonArrayPart:
    """A file that is one JSON array of objects, each with a document in `column`; null and blank ones are skipped. It
    is read at once, however large."""

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
            rows = _parsed(content.decode("utf-8-sig"))
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
class TablePart:
    """Rows [start, stop) of a row group of a parquet file, with a text in `column`; empty rows are skipped."""

    file: Path
    column: str
    group: int
    start: int
    stop: int

    def read(self) -> list[str]:
        """Reads the documents.

        Raises:
            ValmError: the file is damaged.
        """
        try:
            return self._read()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValmError(f"cannot read the corpus {self.file}: {one_line(str(error))}") from error

    def _read(self) -> list[str]:
        texts: list[str] = []
        row = 0
        with pq.ParquetFile(self.file) as table:
            for batch in table.iter_batches(READ_ROWS, row_groups=[self.group], columns=[self.column]):
                if row + len(batch) > self.start:
                    wanted = batch.slice(max(0, self.start - row), self.stop - max(row, self.start))
                    texts += [text for text in wanted[0].to_pylist() if text and text.strip()]
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
    """The files among `paths`; a folder is replaced by the files with SUFFIXES below it, sorted by path, without hidden
    ones.

    Raises:
        ValmError: a path is missing or is not a regular file, or a folder has no such file.
    """
    files = []
    for path in map(Path, paths):
        path = path.absolute()  # another machine may have another working directory
        if path.is_dir():
            found = sorted(
                file.relative_to(path).as_posix()
                for file in path.rglob("*")
                if file.is_file() and _suffix(file) in SUFFIXES
            )
            found = [name for name in found if not any(part.startswith(".") for part in name.split("/"))]
            if not found:
                raise ValmError(f"the folder {path} has no file that ends in {', '.join(SUFFIXES)}, or these and .gz")
            files += [path / name for name in found]
        elif path.exists():
            check_regular(path)
            files.append(path)
        else:
            raise ValmError(f"there is no corpus file {path}")
    return files


def file_parts(
    paths: Iterable[str | os.PathLike], *, column: str = "text", part_bytes: int = PART_BYTES
) -> list[TextPart | JsonArrayPart | TablePart]:
    """The parts of files and folders (see `corpus_files`), in order.

    Args:
        column: of the text in JSON and parquet files.

    Raises:
        ValmError: a file is missing or has another format than its suffix. Reading a part raises it for a bad row or
            line; the message names the file and the line.
    """
    parts: list[TextPart | JsonArrayPart | TablePart] = []
    for file in corpus_files(paths):
        suffix = _suffix(file)
        if suffix == ".parquet":
            if file.suffix == ".gz":
                raise ValmError(f"{file} is a compressed parquet file, which is compressed itself: gunzip it first")
            parts += _table_parts(file, column, part_bytes)
        elif suffix == ".json" and _begins_array(file):
            parts.append(JsonArrayPart(file, column))
        else:
            size = _size(file)
            for start in range(0, size, part_bytes):
                end = min(start + part_bytes, size)
                lines = JsonLinesPart(file, start, end, column) if suffix in JSON_LINES else TextPart(file, start, end)
                parts.append(lines)
    return parts


def row_documents(rows: Iterable[Mapping[str, Any]], column: str = "text") -> Iterator[str]:
    """The text in `column` of each row of a dataset (`open_dataset`, or any iterable of rows); null and blank ones are
    skipped.

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
        part.append(document)
        if isinstance(document, str):
            size, limit = size + len(document.encode()), part_bytes
        else:
            size, limit = size + len(document), part_tokens
        if size >= limit:
            yield DocumentsPart(part)
            part, size = [], 0
    if part:
        yield DocumentsPart(part)


def json_document(row: Any, column: str) -> str | None:
    """The text in `column` of a JSON object; None if it is null or blank.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with a text in {column!r}, got {short(row)}")
    if column not in row:
        raise ValueError(f"there is no {column!r}, only {', '.join(map(str, row)) or 'an empty object'}")
    text = row[column]
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{column!r} is {short(text)}, expected a text")
    return utf8(text) if text.strip() else None


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


def _begins_array(file: Path) -> bool:
    with _open(file) as content:
        return content.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


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


def _table_parts(file: Path, column: str, part_bytes: int) -> list[TablePart]:
    try:
        with pq.ParquetFile(file) as table:
            schema, metadata = table.schema_arrow, table.metadata
    except (pa.ArrowException, OSError) as error:
        raise ValmError(f"cannot read the corpus {file}: {one_line(str(error))}") from error
    if column not in schema.names:
        raise ValmError(f"the corpus {file} has no column {column!r}; it has {', '.join(schema.names)}")
    if schema.names.count(column) > 1:
        raise ValmError(
            f"the corpus {file} has {schema.names.count(column)} columns {column!r}; give each its own name"
        )
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
