"""A corpus in parts, each small enough for memory: retrieval makes a shard of each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from valm.errors import ValmError
from valm.text import one_line

# Text in a part, and tokens where they are given: about a million tokens either way. A killed retrieval has one part to
# do again.
PART_BYTES = 4 << 20
PART_TOKENS = 1 << 20
READ_ROWS = 4096


class Part(Protocol):
    """A part of a corpus, which says where it is and reads it when asked."""

    def read(self) -> list[str] | list[Sequence[int]]:
        """Its documents, as text or as token ids."""


@dataclass(frozen=True)
class TextPart:
    """The lines of a UTF-8 text file that begin in its bytes [start, end). Each is a document; blank ones are none."""

    file: Path
    start: int
    end: int

    def read(self) -> list[str]:
        """Raises ValmError where the file is not UTF-8."""
        texts = []
        with open(self.file, "rb") as file:
            if self.start:  # the line that begins before `start` is another part's, to its end
                file.seek(self.start - 1)
                file.readline()
            while (begin := file.tell()) < self.end:
                try:
                    text = file.readline().decode("utf-8").strip()
                except UnicodeDecodeError as error:
                    raise ValmError(
                        f"the corpus {self.file} is not UTF-8 text: {error.reason} at byte {begin + error.start}"
                    ) from error
                if text:
                    texts.append(text)
        return texts


@dataclass(frozen=True)
class TablePart:
    """Rows [start, stop) of a row group of a parquet file, with a text in `column`; empty ones are no documents."""

    file: Path
    column: str
    group: int
    start: int
    stop: int

    def read(self) -> list[str]:
        """Raises ValmError where the file is damaged."""
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
class TokenPart:
    """Documents that are token ids already."""

    documents: list[Sequence[int]]

    def read(self) -> list[Sequence[int]]:
        return self.documents


def file_parts(
    files: Sequence[str | os.PathLike], *, column: str = "text", part_bytes: int = PART_BYTES
) -> list[TextPart | TablePart]:
    """The parts of text files, one document a line, and of `.parquet` files, one document a row of `column`.

    Raises ValmError for a file that is missing or is not what its name says.
    """
    parts: list[TextPart | TablePart] = []
    for file in map(Path, files):
        if not file.is_file():
            raise ValmError(f"there is no corpus file {file}")
        file = file.absolute()  # another machine has another working directory
        if file.suffix == ".parquet":
            parts += _table_parts(file, column, part_bytes)
        else:
            size = file.stat().st_size
            parts += [TextPart(file, start, min(start + part_bytes, size)) for start in range(0, size, part_bytes)]
    return parts


def token_parts(documents: Iterable[Sequence[int]], *, part_tokens: int = PART_TOKENS) -> Iterator[TokenPart]:
    """`documents` (token ids), read as they are asked for, in parts of about `part_tokens` tokens.

    Raises ValmError for an empty document.
    """
    part: list[Sequence[int]] = []
    tokens = 0
    for document in documents:
        if not len(document):
            raise ValmError("the corpus has an empty document")
        part.append(document)
        tokens += len(document)
        if tokens >= part_tokens:
            yield TokenPart(part)
            part, tokens = [], 0
    if part:
        yield TokenPart(part)


def fingerprint(documents: list[str] | list[Sequence[int]]) -> str:
    """SHA-256 over documents as `Part.read` gives them."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode() if isinstance(document, str) else np.asarray(document, np.int32).tobytes()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


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
