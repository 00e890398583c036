"""Reads and writes files of JSON, YAML and text, and output files and folders. OSErrors are not wrapped."""

from __future__ import annotations

import errno
import functools
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from valm.errors import ValmError
from valm.text import one_line
from valm_kernels.atomic_files import atomic_path
from valm_kernels.json_files import check_regular, short

# OSErrors caused by the content of a file: Pillow sets no errno, and a damaged archive or dataset leads to an invalid
# offset or name. Other errors come from the machine: disk, memory, permissions, open files.
CONTENT_ERRORS = (None, errno.EINVAL, errno.ENAMETOOLONG)
# Seconds that a build waits for the lock of its folder. The workers of a killed command share the lock and end sooner.
WAIT_SECONDS = 5.0

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
# Without NUL, which system calls reject.
PathText = Annotated[str, Field(pattern=r"^[^\x00]+$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def relative_path(target: str | os.PathLike, folder: str | os.PathLike) -> str:
    """`target` relative to `folder`. Links are resolved first, because the system resolves them before ".."."""
    path = Path(target)
    if path.name in ("", ".."):
        place = os.path.realpath(path)
    else:  # keep the name itself, which may be a link whose target changes later
        place = os.path.join(os.path.realpath(path.parent), path.name)
    return Path(os.path.relpath(place, os.path.realpath(folder))).as_posix()


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Writes `value` as JSON, all or nothing; indent=None writes one line."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, what: str, schema: Any, remedy: str = "make it again") -> Any:
    """The JSON value in `path`, with all its keys, checked against `schema` (`parse_json`).

    Args:
        what: what the file is, for the error.
        remedy: what to do if the file is damaged, for the error.

    Raises:
        OSError: the file cannot be read.
        ValmError: the file is not JSON or does not match the schema.
    """
    content = path.read_bytes()
    try:
        return parse_json(content, schema)
    except ValueError as error:
        raise ValmError(f"{what} {path} is damaged: {error}; {remedy}") from error


def parse_json(content: bytes | str, schema: Any) -> Any:
    """The JSON value in `content`, including keys that the schema lacks.

    Args:
        schema: a type that pydantic checks strictly, such as a TypedDict of typing_extensions or a dataclass.

    Raises:
        ValueError: the content is not JSON or does not match the schema; the message names the first difference.
    """
    try:
        _checker(schema).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]).lstrip(".")
        found = "" if first["type"] in ("missing", "json_invalid", "value_error") else f", got {short(first['input'])}"
        raise ValueError(one_line(f"{place and f'{place}: '}{first['msg']}{found}")) from error
    return from_json(content)


@functools.cache
def _checker(schema: Any) -> TypeAdapter:
    return TypeAdapter(schema)


def read_yaml(path: Path, what: str) -> Any:
    """The YAML value in `path`.

    Args:
        what: what the file is, for the error.

    Raises:
        OSError: the file cannot be read.
        ValmError: the file is not YAML, or contains a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:  # PyYAML would take the last
                raise ValueError(f"it contains {short(twice[0])} twice: leave one out")
            return super().construct_mapping(node, deep)

    text = read_text(path)
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # PyYAML raises many types for an invalid value, such as 2026-99-99
        raise ValmError(f"{what} {path} cannot be read: {one_line(str(error))}") from error


def read_text(path: str | os.PathLike) -> str:
    """The content of a UTF-8 text file, without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        ValmError: the file is not UTF-8 text.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValmError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def name_of(folder: str | os.PathLike, unlike: Iterable[str] = ()) -> str:
    """A name for the content of `folder`: the end of its path, long enough to differ from the names `unlike`."""
    parts = Path(os.path.abspath(folder)).parts
    tails = ("/".join(parts[start:]) for start in range(len(parts) - 1, 0, -1))
    return next((tail for tail in tails if tail not in unlike), f"{folder} again")


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """The end of each path, long enough to differ from the other ends; equal paths are not shortened."""
    every = [Path(os.path.abspath(path)).parts for path in paths]
    return [
        next(
            ("/".join(parts[-n:]) for n in range(1, len(parts)) if [p[-n:] for p in every].count(parts[-n:]) == 1),
            str(path),
        )
        for path, parts in zip(paths, every, strict=True)
    ]


def is_transient(error: BaseException) -> bool:
    """True for errors of the machine (disk, permissions), not of the content: a retry may succeed."""
    return isinstance(error, OSError) and error.errno not in CONTENT_ERRORS


def cannot_read(name: object, reason: object) -> ValmError:
    """The error for a source that cannot be read because of a transient error."""
    return ValmError(f"cannot read {name}: {reason}. Once it can be read, run the same command again: it resumes")


def files_below(folder: Path) -> list[str]:
    """Sorted paths of all files in `folder` and below, relative to it, with forward slashes. Hidden files and folders
    are left out. A folder that several paths lead to is read once, by its own path if it is below `folder`.

    Raises:
        OSError: a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise error

    names: list[str] = []
    visited: set[tuple[int, int]] = set()
    roots = [folder]
    for root in roots:  # the loop adds links
        for directory, folders, files in os.walk(root, onerror=unreadable):
            found = os.stat(directory)
            if (found.st_dev, found.st_ino) in visited:
                folders.clear()
                continue
            visited.add((found.st_dev, found.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            below = [Path(directory) / name for name in folders]
            roots += [path for path in below if path.is_symlink()]
            here = (Path(directory) / name for name in files if not name.startswith("."))
            names += (file.relative_to(folder).as_posix() for file in here)
    return sorted(names)


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A temporary file whose content replaces the file `path`, all or nothing. `path` may be a link.

    Raises:
        OSError: the file cannot be written, or `path` is a pipe, a socket or a device.
    """
    with suppress(FileNotFoundError):
        check_regular(path)
    with atomic_path(Path(os.path.realpath(path))) as temporary:
        yield temporary


def set_mode(file: Path, mode: int) -> None:
    """Sets the mode of a file, if the file system supports modes."""
    if stat.S_IMODE(file.stat().st_mode) != mode:
        with suppress(PermissionError):
            file.chmod(mode)


def writable_folder(path: str | os.PathLike) -> Path:
    """The folder `path`, created if missing. Raises OSError if it is not writable."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):  # fail before hours of work
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
    return path
