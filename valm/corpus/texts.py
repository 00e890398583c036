"""The texts of a corpus: of text, JSON, CSV, TSV and parquet files, of folders of them, and of rows of a dataset.

The suffix decides the format: JSON_LINES (one object a line; a `.json` may be one array), DELIMITERS (CSV and TSV) and
`.parquet` have a text in a column. Without that column a table of captions (`valm.knowledge_base.captions`) has them.
OTHER_FORMATS are not read. Anything else is UTF-8 text with one document a line. A text of an image is a `Caption`.
All but parquet, which is compressed itself, may end in `.gz`. A file is read once, as a stream; a JSON array is in
memory as a whole.
"""

from __future__ import annotations

import codecs
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from valm.clip.read_image import IMAGE_SUFFIXES
from valm.errors import ValmError
from valm.knowledge_base.captions import (
    CAPTION_COLUMNS,
    CAPTION_SUFFIXES,
    IMAGE_COLUMNS,
    caption_header,
    first_of,
    read_json_table,
    read_rows,
)
from valm.store.files import check_regular, exists, files_below, is_folder
from valm.text import decoded, one_line, utf8, why_no_text
from valm_kernels.json_files import short

COLUMN = "text"  # where the text is, unless another column is named
READ_ROWS = 4096
HEAD_BYTES = 1 << 12
BUFFER = 1 << 16
# Length of a document and of its line. Tokenizers take 140 times the memory, and abort where there is not as much.
MAX_DOCUMENT = 16 << 20
TOO_LONG = f"a document or line of more than {MAX_DOCUMENT >> 20} MiB: split it into several"
JSON_LINES = (".jsonl", ".jsonlines", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
# Suffixes of the files that are read in a folder; all but parquet also with `.gz`.
SUFFIXES = (".txt", ".text", *JSON_LINES, *DELIMITERS, ".parquet")
# Of what is no text: an error where it is named, counted in a warning where it is in a folder.
OTHER_FORMATS = (
    *(".html", ".htm", ".xhtml", ".xml", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".ipynb"),
    *(".xls", ".xlsx", ".ods", ".arrow", ".feather", ".parq", ".pq", ".orc"),
    *(".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".zst"),
)
QUOTE = "quote fields as in RFC 4180, or save the texts as .jsonl"


class Caption(str):
    """A text of an image, of which others may be too, such as one caption of several.

    Attributes:
        image: what tells it from other images of the corpus.
    """

    image: str

    def __new__(cls, text: str, image: str = "") -> Caption:
        made = super().__new__(cls, text)
        made.image = image
        return made


@dataclass(frozen=True)
class TextCorpus:
    """The texts that `valm retrieve` and `valm train` read; nothing is opened before they are asked for.

    Attributes:
        files: of texts, and folders of them, as for `read_documents`.
        dataset: a Hugging Face dataset instead of files, NAME[:CONFIG[:SPLIT]] (`open_dataset`).
        streaming: read the dataset as it is downloaded.
        column: where the text is in all but text files.

    Raises:
        ValmError: both files and a dataset are given, or streaming without a dataset.
    """

    files: Sequence[str | os.PathLike] = ()
    dataset: str | None = None
    streaming: bool = False
    column: str = COLUMN

    def __post_init__(self) -> None:
        if self.dataset is not None and self.files:
            raise ValmError("give either corpus files or --dataset")
        if self.dataset is None and self.streaming:
            raise ValmError("--streaming is of a Hugging Face dataset: give --dataset too")

    def documents(self) -> Iterator[str]:
        """Every document, in order.

        Raises:
            ValmError: the corpus cannot be read.
            ImportError: a dataset is given, and the package `datasets` is not installed.
        """
        if self.dataset is None:
            return read_documents(self.files, column=self.column)
        from valm.knowledge_base.sources.dataset import open_dataset

        return row_documents(open_dataset(self.dataset, streaming=self.streaming), self.column)


def read_documents(paths: Iterable[str | os.PathLike], *, column: str = COLUMN) -> FileDocuments:
    """The documents of files and folders (see `corpus_files`), in order. Blank ones are skipped.

    Args:
        column: of the text in JSON, CSV, TSV and parquet files.

    Raises:
        ValmError: a file is missing, is no text, has another format than its suffix, or its first document cannot be
            read. Iterating raises it for any other; the message names the file and the line.
    """
    return FileDocuments(corpus_files(paths), column)


def row_documents(rows: Iterable[Mapping[str, Any]], column: str = COLUMN) -> Iterator[str]:
    """The text in `column` of each row of a dataset (`open_dataset`, or any iterable of rows); blank ones are skipped.

    Raises:
        ValmError: a row has no text there; the message names the row.
    """
    return _texts_of(((f"the dataset, row {number}", row) for number, row in enumerate(rows)), column)


def corpus_files(paths: Iterable[str | os.PathLike]) -> list[tuple[Path, str]]:
    """The files among `paths`; a folder is replaced by the files with SUFFIXES below it (`files_below`), sorted by path
    and without metadata of images (`_without_metadata`). Warns of files there in OTHER_FORMATS.

    With each comes its name in the corpus, however its path is typed: the number of the path, and the file below it.

    Raises:
        ValmError: a path is missing or is not a regular file, or a folder has no such file.
    """
    files = []
    for number, path in enumerate(map(Path, paths)):
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
            files += [(file, f"{number}/{file.relative_to(path).as_posix()}") for file in found]
        elif exists(path):
            check_regular(path)
            files.append((path, f"{number}/{path.name}"))
        else:
            raise ValmError(f"there is no corpus file {path}")
    return files


def fingerprint(documents: Iterable[str | Sequence[int]]) -> str:
    """SHA-256 over documents, as texts or as token ids."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode() if isinstance(document, str) else np.asarray(document, np.int32).tobytes()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


class FileDocuments(Iterator[str]):
    """The documents of `files` (`corpus_files`), in order; arguments and errors as in `read_documents`."""

    def __init__(self, files: Sequence[tuple[Path, str]], column: str) -> None:
        for file, _ in files:  # which would else be refused only after the hours that those before it take
            with open(file, "rb") as raw:
                next(_documents(file, raw, column), None)
        self._total = sum(file.stat().st_size for file, _ in files)
        self._before = 0
        self._raw: BinaryIO | None = None
        self._iterator = self._read(files, column)

    def __next__(self) -> str:
        return next(self._iterator)

    @property
    def share(self) -> float:
        """How much of the files' bytes has been read, from 0 to 1."""
        return (self._before + (self._raw.tell() if self._raw is not None else 0)) / max(1, self._total)

    def _read(self, files: Sequence[tuple[Path, str]], column: str) -> Iterator[str]:
        images = functools.lru_cache(1)(_image_stems)
        for file, name in files:
            of_image = file.suffix.lower() in CAPTION_SUFFIXES and file.stem in images(file.parent)
            with open(file, "rb") as self._raw:
                texts = _documents(file, self._raw, column)
                yield from (Caption(text, os.path.splitext(name)[0]) for text in texts) if of_image else texts
            self._raw = None
            self._before += file.stat().st_size


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


def _suffix(file: Path) -> str:
    """The suffix that tells a file's format: the one before `.gz`, in lower case."""
    return os.path.splitext(file.name.lower().removesuffix(".gz"))[1]


def _image_stems(folder: Path) -> set[str]:
    """The names of the images in `folder`, without suffix; none where it cannot be listed."""
    try:
        return {os.path.splitext(name)[0] for name in os.listdir(folder) if _is_image(name)}
    except PermissionError:
        return set()


def _is_image(name: object) -> bool:
    return isinstance(name, str) and name.lower().endswith(tuple(IMAGE_SUFFIXES))


def _of_image(text: str, name: object) -> str:
    """`text`, as a caption if it is that of an image, which its row names."""
    return Caption(text, str(name)) if _is_image(name) else text


def _documents(file: Path, raw: BinaryIO, column: str) -> Iterator[str]:
    """The documents in `raw`, the content of `file`."""
    suffix, packed = _suffix(file), file.suffix.lower() == ".gz"
    if suffix in OTHER_FORMATS:
        raise ValmError(
            f"the corpus {file} is of a format that is not read: save its text as .txt, one document a line, and a "
            "table as .csv or .parquet; unpack an archive, or use .gz"
        )
    if suffix == ".parquet" and packed:
        raise ValmError(f"{file} is a compressed parquet file, which is compressed itself: gunzip it first")
    try:
        if suffix == ".parquet":
            yield from _of_parquet(file, raw, column)
            return
        content: Any = io.BufferedReader(gzip.GzipFile(fileobj=raw), BUFFER) if packed else raw
        head = content.peek(HEAD_BYTES)[:HEAD_BYTES]
        array = suffix == ".json" and head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        _check_head(file, head, array)
        if not packed and (captions := _of_captions(file, head, column)) is not None:
            yield from captions
        elif array:
            yield from _of_json_array(file, content, column)
        elif suffix in JSON_LINES:
            yield from _of_json_lines(file, content, column)
        elif suffix in DELIMITERS:
            yield from _of_csv(file, content, column)
        else:
            yield from _of_text(file, content)
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValmError(f"cannot read the corpus {file}: {one_line(str(error))}") from error


def _check_head(file: Path, head: bytes, array: bool) -> None:
    """Raises ValmError if a file that begins with `head` is no text, or would be read as another one than it is."""
    if reason := why_no_text(head):
        raise ValmError(f"the corpus {file} {reason}")
    if b"\r" in head.rstrip(b"\r") and b"\n" not in head and not array:  # which may have blanks of any kind
        raise ValmError(
            f"the corpus {file} has {'rows' if _suffix(file) in DELIMITERS else 'lines'} that end in a carriage return "
            "alone: convert them to line feeds, such as by `tr '\\r' '\\n'`"
        )


def _lines(file: Path, content: BinaryIO, most: int = MAX_DOCUMENT) -> Iterator[tuple[int, str]]:
    """The lines of `file`, of `most` bytes at most, with their numbers from 1."""
    begin = 0
    for number in itertools.count(1):
        line = content.readline(most + 1)
        if not line:
            return
        if b"\0" in line:
            raise ValmError(f"the corpus {file}, line {number}: it has a NUL byte, so it is no text")
        if len(line) > most:
            raise ValmError(f"the corpus {file}, line {number}: {TOO_LONG}")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValmError(
                f"the corpus {file} is not UTF-8 text: {error.reason} in line {number}, at byte {begin + error.start}: "
                "convert it to UTF-8"
            ) from error
        yield number, text
        begin += len(line)


def _of_captions(file: Path, head: bytes, column: str) -> Iterator[Caption] | None:
    """The captions in a table as `kb build` reads it, of which `head` is the beginning; None for another file, and for
    rows that have their text in `column`, or should. Without COLUMN the captions are the text, but never in the place
    of another column: its name may be mistyped."""
    if file.name == "captions.json":
        return _of_json_captions(file, column) if head.lstrip(codecs.BOM_UTF8).lstrip().startswith(b"{") else None
    named = None if column == COLUMN else column
    of_rows = _suffix(file) in DELIMITERS  # which have the text of another column themselves
    header = caption_header(head) if (of_rows and not named) or file.name == "captions.txt" else []
    if not header or (of_rows and column in header):
        return None
    return (Caption(caption, image) for image, caption in read_rows(file, caption_column=named) if caption)


def _of_json_captions(file: Path, column: str) -> Iterator[Caption] | None:
    """The captions in an object of all images; None if the file has an object a line, as other JSON lines."""
    try:
        found = read_json_table(file)
    except ValmError:
        with open(file, "rb") as lines:
            if _is_json(next(filter(bytes.strip, lines), b"")):
                return None
        raise
    if column in found:
        return None
    if column not in CAPTION_COLUMNS:
        raise ValmError(f"the corpus {file} has captions of images, and no column {column!r}: name none by --column")
    return (Caption(line, name) for name, lines in found.items() for line in lines)


def _of_text(file: Path, content: BinaryIO) -> Iterator[str]:
    for _, line in _lines(file, content):
        if text := line.removeprefix("\ufeff").strip():
            yield text


def _of_json_lines(file: Path, content: BinaryIO, column: str) -> Iterator[str]:
    def rows() -> Iterator[tuple[str, Any]]:
        for number, line in _lines(file, content):
            if line := line.removeprefix("\ufeff").strip():
                where = f"the corpus {file}, line {number}"
                yield where, _parsed(line, where)

    return _texts_of(rows(), column)


def _of_json_array(file: Path, content: BinaryIO, column: str) -> Iterator[str]:
    whole = "".join(line for _, line in _lines(file, content, 1 << 62))
    rows = enumerate(_parsed(whole.removeprefix("\ufeff"), f"the corpus {file}"), 1)
    return _texts_of(((f"the corpus {file}, element {number} of its array", row) for number, row in rows), column)


def _of_csv(file: Path, content: BinaryIO, column: str) -> Iterator[str]:
    csv.field_size_limit(MAX_DOCUMENT)
    lines = (line.removeprefix("\ufeff") if number == 1 else line for number, line in _lines(file, content))
    rows = csv.reader(lines, delimiter=DELIMITERS[_suffix(file)], strict=True)
    header: list[str] = []
    place, image = 0, None
    try:
        for row in rows:
            if not header:
                if "".join(row).strip():  # a row before it may be blank
                    header = [name.strip() for name in row]
                    place, image = _place_of(column, header, file), first_of(IMAGE_COLUMNS, header)
            elif row and len(row) != len(header):
                raise ValmError(
                    f"the corpus {file}, line {rows.line_num}: the row has {len(row)} fields, but the header "
                    f"{len(header)}: {QUOTE}"
                )
            elif row and row[place].strip():
                yield row[place] if image is None else _of_image(row[place], row[header.index(image)])
    except csv.Error as error:
        reason = TOO_LONG if "field limit" in str(error) else f"{error}: {QUOTE}"
        raise ValmError(f"the corpus {file}, line {rows.line_num}: {reason}") from error


def _of_parquet(file: Path, raw: BinaryIO, column: str) -> Iterator[str]:
    with pq.ParquetFile(raw) as table:
        _place_of(column, table.schema_arrow.names, file)
        kind = table.schema_arrow.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValmError(f"the column {column!r} of the corpus {file} holds {kind}, expected text")
        # of one group after the other: pyarrow reads ahead all that it is asked for
        image = first_of(IMAGE_COLUMNS, table.schema_arrow.names)
        if image is None or table.schema_arrow.field(image).type != pa.string():
            image = column
        groups = (table.iter_batches(READ_ROWS, [group], [column, image]) for group in range(table.num_row_groups))
        rows = ((batch[column].to_pylist(), batch[image].to_pylist()) for batches in groups for batch in batches)
        pairs = itertools.chain.from_iterable(zip(*columns, strict=True) for columns in rows)
        for number, (text, name) in enumerate(pairs):
            if text is None or len(text) > MAX_DOCUMENT:
                wrong = TOO_LONG if text else f"{column!r} is null, expected a text"
                raise ValmError(f"the corpus {file}, row {number}: {wrong}")
            if text.strip():
                yield _of_image(text, name if image != column else None)


def _place_of(column: str, names: list[str], file: Path) -> int:
    """The place of the column of this name, of which there must be one."""
    if column not in names:
        raise ValmError(
            f"the corpus {file} has no column {column!r}; it has {', '.join(names)}: name one by --column, or name the "
            "files instead of the folder"
        )
    if names.count(column) > 1:
        raise ValmError(f"the corpus {file} has {names.count(column)} columns {column!r}; give each its own name")
    return names.index(column)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(decoded(line))
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValmError(f"{where}: not JSON: {error}") from error


def _texts_of(rows: Iterable[tuple[str, Any]], column: str) -> Iterator[str]:
    """The texts in `column` of rows, each behind the place that errors name; blank ones are skipped."""
    for where, row in rows:
        if text := _text_of(row, column, where):
            image = first_of(IMAGE_COLUMNS, row)
            yield text if image is None else _of_image(text, row[image])


def _text_of(row: Any, column: str, where: str) -> str | None:
    """The text in `column` of a row; None if it is blank."""
    if not isinstance(row, Mapping):
        raise ValmError(f"{where}: expected an object with a text in {column!r}, got {short(row)}")
    if column not in row:
        raise ValmError(f"{where}: there is no {column!r}, only {', '.join(map(str, row)) or 'an empty object'}")
    text = row[column]
    if not isinstance(text, str):
        raise ValmError(f"{where}: {column!r} is {'null' if text is None else short(text)}, expected a text")
    if len(text) > MAX_DOCUMENT:
        raise ValmError(f"{where}: {TOO_LONG}")
    return utf8(text) if text.strip() else None
