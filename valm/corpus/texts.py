"""The texts of a corpus: from text, JSON, CSV, TSV and parquet files, folders of such files, captions of pictures, and
rows of a dataset.

The suffix decides the format. JSON_LINES (one object a line; a `.json` may be one array), DELIMITERS (CSV and TSV) and
`.parquet` contain texts in a column. Any other file is UTF-8 text with one document a line. A text of an image is a
`Caption`. All formats except parquet, which is compressed itself, may end in `.gz`. A file is read once, as a stream,
but a JSON array is read into memory.
"""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import logging
import os
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
from valm.knowledge_base.captions import CAPTION_COLUMNS, CAPTION_SUFFIXES, IMAGE_COLUMNS, first_of
from valm.knowledge_base.images import ImageSource
from valm.store.files import files_below
from valm.text import one_line, printable, utf8
from valm_kernels.json_files import check_regular, short

log = logging.getLogger(__name__)

COLUMN = "text"  # the column of texts by default; captions of images are also in the first of CAPTION_COLUMNS
READ_ROWS = 4096
# The most characters of a document. Tokenizers take 140 times the memory, and abort if there is less.
MAX_DOCUMENT = 16 << 20
TOO_LONG = f"a document or line of more than {MAX_DOCUMENT >> 20} MiB: split it into several"
JSON_LINES = (".jsonl", ".jsonlines", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
# Suffixes of files that are read in a folder; all except parquet also with `.gz`.
SUFFIXES = (".txt", ".text", *JSON_LINES, *DELIMITERS, ".parquet")
FLICKR_CAPTIONS = "captions.txt"  # a CSV, if its columns are images and captions
HEAD_BYTES = 1 << 12
NAME_IT = "name one by --column"
END = object()


class Caption(str):
    """A text that describes an image, such as one of several captions.

    Attributes:
        image: a name that is different for every image of the corpus.
    """

    image: str

    def __new__(cls, text: str, image: str = "") -> Caption:
        made = super().__new__(cls, utf8(text))
        made.image = image
        return made


@dataclass(frozen=True)
class TextCorpus:
    """The texts that `valm retrieve` and `valm train` read. `documents` opens the files.

    Attributes:
        files: text files and folders of text files, as for `read_documents`.
        dataset: a Hugging Face dataset instead of files, NAME[:CONFIG[:SPLIT]] (`open_dataset`).
        streaming: read the dataset while it is downloaded.
        column: name of the text column, in formats with columns.
        captions: a table of captions of the pictures in the folders and zip files among `files`.

    Raises:
        ValmError: files or captions are given together with a dataset, or streaming without a dataset.

    Example:
        >>> from valm.corpus.texts import TextCorpus
        >>> next(TextCorpus(["corpus.txt"]).documents())
        'a red apple'
    """

    files: Sequence[str | os.PathLike] = ()
    dataset: str | None = None
    streaming: bool = False
    column: str = COLUMN
    captions: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        if self.dataset is not None and (self.files or self.captions):
            raise ValmError("give either corpus files, with --captions, or --dataset")
        if self.dataset is None and self.streaming:
            raise ValmError("--streaming needs a Hugging Face dataset: give --dataset too")

    def documents(self) -> Iterator[str]:
        """Every document, in order.

        Raises:
            ValmError: the corpus cannot be read.
            ImportError: a dataset is given, and the package `datasets` is not installed.
        """
        if self.dataset is None:
            return read_documents(self.files, column=self.column, captions=self.captions)
        from valm.knowledge_base.sources.dataset import open_dataset

        return row_documents(open_dataset(self.dataset, streaming=self.streaming), self.column)


def read_documents(
    paths: Iterable[str | os.PathLike], *, column: str = COLUMN, captions: str | os.PathLike | None = None
) -> FileDocuments:
    """The documents of files and folders (see `corpus_files`), in order, without blank documents.

    Args:
        column: name of the text column in JSON, CSV, TSV and parquet files.
        captions: a table of captions of the pictures in folders and zip files of pictures.

    Raises:
        OSError: a file is missing or not a regular file.
        ValmError: a file's format differs from its suffix, or its first document cannot be read. Iterating raises it
            for other documents. The message names the file and the row.
    """
    return FileDocuments(corpus_files(paths, captions), column)


def row_documents(rows: Iterable[Mapping[str, Any]], column: str = COLUMN) -> Iterator[str]:
    """The text in `column` of each row of a dataset (`open_dataset`, or any iterable of rows), without blank texts.

    Raises:
        ValmError: a row contains no text there; the message names the row.
    """
    return _documents("the dataset", iter(rows), column)


def corpus_files(
    paths: Iterable[str | os.PathLike], captions: str | os.PathLike | None = None
) -> list[tuple[Path, str] | list[Caption]]:
    """The files among `paths`, each with its name in the corpus: the number of the path, and the file below it.

    A folder is replaced by the files with SUFFIXES below it (`files_below`), sorted by path. A folder that contains
    pictures, or a zip file, is replaced by the captions of its pictures.

    Args:
        captions: a table of the captions.

    Raises:
        OSError: a path is missing, or is neither a folder nor a regular file (a pipe cannot be read twice).
        ValmError: a folder contains no such file, its pictures have no captions, or there are no pictures for
            `captions`.
    """
    found: list[tuple[Path, str] | list[Caption]] = []
    for number, path in enumerate(map(Path, paths)):
        check_regular(path)
        below = files_below(path) if path.is_dir() else []
        if any(map(_is_image, below)) or path.suffix.lower() == ".zip":
            found.append(_captions_of(path, captions, number))
        elif path.is_dir():
            files = [file for name in below if (file := path / name).is_file() and _suffix(file) in SUFFIXES]
            if not files:
                raise ValmError(f"the folder {path} has no file that ends in {', '.join(SUFFIXES)}, or these and .gz")
            found += [(file, f"{number}/{file.relative_to(path).as_posix()}") for file in files]
        else:
            found.append((path, f"{number}/{path.name}"))
    if captions is not None and not any(isinstance(part, list) for part in found):
        raise ValmError("--captions is for folders and zip files of pictures, and the corpus contains none")
    return found


def _captions_of(path: Path, table: str | os.PathLike | None, number: int) -> list[Caption]:
    """The captions of the pictures in a folder or zip file, without the captions of pictures that cannot be opened."""
    source = ImageSource(path, captions=table).open()
    for remark in getattr(source, "remarks", ()):
        log.warning(printable(f"{path}: {remark}"))
    pictures = [record for record in source.images() if record.caption and record.is_image()]
    if not pictures:
        raise ValmError(
            f"no picture in {path} has a caption, and of a folder with pictures only the captions are read: name each "
            "other text file by itself"
        )
    return [
        Caption(line, f"{number}/{os.path.splitext(record.uri)[0]}")
        for record in pictures
        for line in record.caption.split("\n")
    ]


def fingerprint(documents: Iterable[str | Sequence[int]]) -> str:
    """SHA-256 over documents, as texts or as token ids."""
    digest = hashlib.sha256()
    for document in documents:
        data = utf8(document).encode() if isinstance(document, str) else np.asarray(document, np.int32).tobytes()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


class FileDocuments(Iterator[str]):
    """The documents of `parts` (`corpus_files`), in order. `read_documents` has the same arguments and errors."""

    def __init__(self, parts: Sequence[tuple[Path, str] | list[Caption]], column: str) -> None:
        self._total = self._before = 0
        for part in parts:
            if isinstance(part, list):
                self._total += sum(map(len, part))
                continue
            with open(part[0], "rb") as raw:  # reject a wrong file now, not after the hours that earlier files take
                next(_documents(f"the corpus {part[0]}", _rows(part[0], raw, column), column), None)
            self._total += part[0].stat().st_size
        self._raw: BinaryIO | None = None
        self._iterator = self._read(parts, column)

    def __next__(self) -> str:
        return next(self._iterator)

    @property
    def share(self) -> float:
        """The share of the files' bytes that has been read, from 0 to 1."""
        return (self._before + (self._raw.tell() if self._raw is not None else 0)) / max(1, self._total)

    def _read(self, parts: Sequence[tuple[Path, str] | list[Caption]], column: str) -> Iterator[str]:
        images = functools.lru_cache(1)(_image_stems)
        for part in parts:
            if isinstance(part, list):
                for caption in part:
                    self._before += len(caption)
                    yield caption
                continue
            file, name = part
            of_image = file.suffix.lower() in CAPTION_SUFFIXES and file.stem in images(file.parent)
            with open(file, "rb") as self._raw:
                texts = _documents(f"the corpus {file}", _rows(file, self._raw, column), column)
                yield from (Caption(text, os.path.splitext(name)[0]) for text in texts) if of_image else texts
                self._raw = None
            self._before += file.stat().st_size


def _image_stems(folder: Path) -> set[str]:
    """The names of the images in `folder`, without suffix."""
    return {os.path.splitext(name)[0] for name in os.listdir(folder) if _is_image(name)}


def _is_image(name: object) -> bool:
    return isinstance(name, str) and name.lower().endswith(tuple(IMAGE_SUFFIXES))


def _suffix(file: Path) -> str:
    """The suffix that names a file's format, in lower case and without `.gz`."""
    return os.path.splitext(file.name.lower().removesuffix(".gz"))[1]


def _rows(file: Path, raw: BinaryIO, column: str) -> Iterator[Any]:
    """The rows of `file`, whose content is `raw`: objects, texts, or None for a blank line."""
    suffix = _suffix(file)
    if suffix == ".parquet":
        with pq.ParquetFile(raw) as table:
            names = [field.name for field in table.schema_arrow if field.name == column or _is_of_caption(field)]
            if not names:
                raise ValueError(
                    f"there is no column {column!r}, only {', '.join(table.schema_arrow.names)}: {NAME_IT}"
                )
            for group in range(table.num_row_groups):  # one at a time: pyarrow reads ahead everything it is asked for
                for batch in table.iter_batches(READ_ROWS, [group], names):
                    yield from batch.to_pylist()
        return
    content: Any = gzip.GzipFile(fileobj=raw) if file.suffix.lower() == ".gz" else raw
    is_table = suffix in DELIMITERS or (file.name == FLICKR_CAPTIONS and _has_captions(raw))
    text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="" if is_table else None)
    lines = iter(functools.partial(text.readline, MAX_DOCUMENT + 1), "")  # bounds the memory of a line
    if is_table:
        csv.field_size_limit(MAX_DOCUMENT)
        for row in csv.DictReader(map(_whole, lines), delimiter=DELIMITERS.get(suffix, ","), strict=True):
            if None in row or None in row.values():
                raise csv.Error("it has another number of fields than the header: quote fields as in RFC 4180")
            yield row
    elif suffix in JSON_LINES:
        first = next(filter(str.strip, lines), "")
        if suffix == ".json" and first.lstrip().startswith("["):
            yield from json.loads(first + text.read())
        else:
            yield from map(_parsed, map(_whole, itertools.chain([first], lines)))
    else:
        yield from map(str.strip, map(_whole, lines))


def _whole(line: str) -> str:
    """A line of at most MAX_DOCUMENT characters and its end. Raises ValueError for a longer line."""
    if len(line) > MAX_DOCUMENT and line[-1] not in "\r\n":
        raise ValueError(TOO_LONG)
    return line


def _parsed(line: str) -> Any:
    """The value in a line of JSON; None if it is blank."""
    return json.loads(line) if line.strip() else None


def _is_of_caption(field: pa.Field) -> bool:
    """Whether a column contains captions or names of images as text. (A column of images may hold the images.)"""
    is_text = pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    return is_text and field.name.lower() in (*CAPTION_COLUMNS, *IMAGE_COLUMNS)


def _has_captions(raw: BinaryIO) -> bool:
    """Whether a file begins with the header of a caption table."""
    header = raw.peek(HEAD_BYTES).decode("utf-8-sig", "replace").partition("\n")[0].split(",")  # type: ignore[attr-defined]
    return None not in (first_of(IMAGE_COLUMNS, header), first_of(CAPTION_COLUMNS, header))


def _documents(name: str, rows: Iterator[Any], column: str) -> Iterator[str]:
    """The texts in `column` of `rows`, without blank texts. `name` names the source in errors."""
    for number in itertools.count(1):
        try:
            if (row := next(rows, END)) is END:
                return
            text = None if row is None else _text_of(row, column)
        except (OSError, EOFError, ValueError, csv.Error, zlib.error, pa.ArrowException, RecursionError) as error:
            raise ValmError(f"{name}, row {number}: {one_line(str(error))}") from error
        if text is not None and text.strip():
            yield text


def _text_of(row: Any, column: str) -> str:
    """The text in `column` of a row. Raises ValueError if there is none."""
    if isinstance(row, str):
        row = {column: row}  # a line of text
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with a text in {column!r}, got {short(row)}")
    image = first_of(IMAGE_COLUMNS, row)
    if column == COLUMN and column not in row and image is not None:
        column = first_of(CAPTION_COLUMNS, row) or column
    if column not in row:
        raise ValueError(f"there is no column {column!r}, only {', '.join(map(str, row))}: {NAME_IT}")
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"{column!r} is {'null' if text is None else short(text)}, expected a text")
    if len(text) > MAX_DOCUMENT:
        raise ValueError(TOO_LONG)
    return Caption(text, row[image]) if image is not None and _is_image(row[image]) else utf8(text)
