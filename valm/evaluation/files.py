"""Reads the files of evaluation sets. Errors name the line; an OSError is not changed."""

from __future__ import annotations

import csv
import io
import json
import os

from valm.errors import ValmError
from valm.store.files import read_text


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a UTF-8 text file that are not empty. Raises ValmError if the file is no UTF-8 text."""
    # not at Unicode's other separators, which may occur within a text
    return [line.removesuffix("\r") for line in read_text(path).split("\n") if line.strip()]


def read_csv(path: str | os.PathLike, columns: list[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with exactly these columns, without blanks around values. Raises ValmError if the file is
    no UTF-8 text, or has other columns."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))  # a quoted value may span several lines
    if reader.fieldnames != columns:
        raise ValmError(f"{path} has the columns {reader.fieldnames}, expected {columns}")
    rows = list(reader)
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ValmError(f"{path}, row {number}: expected {len(columns)} values")
    return [{name: value.strip() for name, value in row.items()} for row in rows]


def read_rows(path: str | os.PathLike) -> list[list[str]]:
    """The rows of a CSV file without a header. Raises ValmError if the file is no UTF-8 text."""
    return [row for row in csv.reader(io.StringIO(read_text(path), newline="")) if any(map(str.strip, row))]


def read_json_lines(path: str | os.PathLike, keys: set[str]) -> list[dict[str, str]]:
    """The JSON objects of a file, one a line, each with a text for at least these keys. Raises ValmError if the file is
    no UTF-8 text, or a line is something else."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValmError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            raise ValmError(f"{path}, line {number}: expected an object with texts for {', '.join(sorted(keys))}")
        rows.append(row)
    return rows
