"""Reads JSON files and checks them: regular files of a bounded size, whose content matches a schema.

A schema is a TypedDict or a dataclass. Its values may be str, int, float, bool, None, Any, a Literal, a union,
`list[...]`, `dict[str, ...]`, another schema, or one of these with a condition: `Annotated[int, Range(0)]`,
`Annotated[str, Matching("[a-z]+", "a word")]`. Extra keys are allowed.
"""

from __future__ import annotations

import functools
import json
import os
import re
import stat
import sys
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

# Far above any file we write: the manifest of 6 billion images in shards of 16,384 has 300 MB.
MAX_BYTES = 1 << 30
SHOWN_CHARACTERS = 60
TYPE_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    type(None): "null",
}

Check = Callable[[Any], None]


@dataclass(frozen=True)
class Range:
    """A condition of a number: from `least` to `most`, which excludes NaN and infinity."""

    least: float
    most: float = 2**63 - 1

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"a number from {self.least} to {self.most}"


@dataclass(frozen=True)
class Matching:
    """A condition of a string: all of it matches `pattern`; `what` describes the pattern in error messages."""

    pattern: str
    what: str

    @functools.cached_property
    def _fullmatch(self) -> Callable[[str], re.Match[str] | None]:
        return re.compile(self.pattern).fullmatch

    def __contains__(self, value: str) -> bool:
        return self._fullmatch(value) is not None

    def __str__(self) -> str:
        return self.what


Count = Annotated[int, Range(0)]
# A possible path: without NUL, which no system call takes, and lone surrogates, which no file system stores.
PathText = Annotated[str, Matching("[^\\0\ud800-\udfff]+", "a path")]
Sha256 = Annotated[str, Matching(r"[0-9a-f]{64}", "a SHA-256 in hexadecimal digits")]


class SchemaError(ValueError):
    """A value that does not match its schema. `where` holds the keys and indices that lead to it, outermost first."""

    def __init__(self, value: Any, expected: str, problem: str | None = None) -> None:
        self.expected = expected
        self.problem = problem or f"is {short(value)}, expected {expected}"
        self.where: list[str | int] = []

    def __str__(self) -> str:
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.where).lstrip(".")
        return f"{place or 'it'} {self.problem}"


def regular_file(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a regular file. Opening a pipe would block, and a device never ends.

    Raises:
        OSError: there is no such file.
        ValueError: it is neither a regular file nor a link to one.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is {_kind(status)}, not a file")
    return status


def own_file(path: str | os.PathLike[str]) -> os.stat_result:
    """`regular_file` for a file that belongs to its folder.

    Raises:
        OSError: as `regular_file`.
        ValueError: as `regular_file`, and for a link that leads out of the folder.
    """
    status = check_own(path)
    return status if stat.S_ISREG(status.st_mode) else regular_file(path)


def check_own(path: str | os.PathLike[str]) -> os.stat_result:
    """Checks that a file or folder is not a link that leads out of the folder it is in; returns its own status.

    Raises:
        OSError: there is no such file or folder.
        ValueError: it is such a link.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        folder = os.path.realpath(os.path.dirname(path))
        if os.path.commonpath([folder, os.path.realpath(path)]) != folder:
            raise ValueError(f"{path} is a link that leads out of its folder; copy what it leads to instead")
    return status


def read_json(path: Path, schema: Any) -> Any:
    """The JSON value in the file `path`, checked against `schema`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged; the message names it.
    """
    size = regular_file(path).st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes, at most {MAX_BYTES:,} are read")
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: its JSON is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error
    try:
        check(value, schema)
    except SchemaError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return value


def check(value: Any, schema: Any) -> None:
    """Checks `value` against `schema`.

    Raises:
        SchemaError: they do not match.
    """
    _check_of(schema)(value)


def short(value: Any) -> str:
    """A value for an error message: on one line, shortened if long."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    shown = ascii(value) if isinstance(value, str) else repr(value)
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}..."


def _kind(status: os.stat_result) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(status.st_mode), "a device")


@functools.cache
def _check_of(schema: Any) -> Check:
    """The check for a schema, built once: a manifest has thousands of entries of one kind."""
    origin, arguments = get_origin(schema), get_args(schema)
    if schema is Any:
        return lambda value: None
    if is_typeddict(schema) or is_dataclass(schema):
        return _object_check(schema)
    if origin is Annotated:
        return _condition_check(_check_of(arguments[0]), arguments[1])
    if origin is Literal:
        return _literal_check(arguments)
    if origin in (Union, types.UnionType):
        return _union_check([_check_of(option) for option in arguments])
    if origin is list:
        return _list_check(_check_of(arguments[0]))
    if origin is dict:
        return _dict_check(_check_of(arguments[1]))
    return _type_check(schema)


def _type_check(schema: Any) -> Check:
    if schema is float:
        return _check_float
    expected = TYPE_NAMES[schema]

    def check_type(value: Any) -> None:
        if type(value) is not schema:  # a bool is an int to isinstance
            raise SchemaError(value, expected)

    return check_type


def _check_float(value: Any) -> None:
    # JSON writes 1.0 as 1 too; beyond the largest float are infinity, NaN and an int of a thousand digits
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise SchemaError(value, TYPE_NAMES[float])


def _condition_check(of_type: Check, condition: Range | Matching) -> Check:
    def check_condition(value: Any) -> None:
        of_type(value)
        if value not in condition:
            raise SchemaError(value, str(condition))

    return check_condition


def _literal_check(allowed: tuple[Any, ...]) -> Check:
    def check_literal(value: Any) -> None:
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise SchemaError(value, " or ".join(map(repr, allowed)))

    return check_literal


def _union_check(options: list[Check]) -> Check:
    def check_union(value: Any) -> None:
        errors = []
        for option in options:
            try:
                return option(value)
            except SchemaError as error:
                errors.append(error)
        # the option that fits best is the one whose error lies deepest
        deepest = max(errors, key=lambda error: len(error.where))
        if deepest.where:
            raise deepest
        raise SchemaError(value, " or ".join(error.expected for error in errors))

    return check_union


def _list_check(item: Check) -> Check:
    def check_list(value: Any) -> None:
        if type(value) is not list:
            raise SchemaError(value, "a list")
        place = 0
        try:
            for place, one in enumerate(value):  # noqa: B007
                item(one)
        except SchemaError as error:
            error.where.insert(0, place)
            raise

    return check_list


def _dict_check(item: Check) -> Check:
    def check_dict(value: Any) -> None:
        if type(value) is not dict:
            raise SchemaError(value, TYPE_NAMES[dict])
        for key, one in value.items():
            try:
                item(one)
            except SchemaError as error:
                error.where.insert(0, key)
                raise

    return check_dict


def _object_check(schema: Any) -> Check:
    hints = get_type_hints(schema, include_extras=True)
    checks = [(key, _check_of(hint)) for key, hint in hints.items()]
    if is_dataclass(schema):
        required = frozenset(field.name for field in fields(schema) if field.default is MISSING)
    else:
        required = schema.__required_keys__

    def check_object(value: Any) -> None:
        if type(value) is not dict:
            raise SchemaError(value, TYPE_NAMES[dict])
        key = ""
        try:
            for key, one in checks:
                if key in value:
                    one(value[key])
                elif key in required:
                    break
            else:
                return
        except SchemaError as error:
            error.where.insert(0, key)
            raise
        raise SchemaError(value, f"one with {key!r}", f"has no {key!r}")

    return check_object
