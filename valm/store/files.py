"""JSON files, output folders, and errors about files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from valm.errors import ValmError
from valm.text import one_line, why_no_text
from valm_kernels import atomic_files, json_files
from valm_kernels.json_files import short

# OSErrors caused by the content of a file: Pillow's have no errno, and a damaged archive or dataset leads to an invalid
# offset or name. All others come from the machine: disk, memory, permissions, open files.
CONTENT_ERRORS = (None, errno.EINVAL, errno.ENAMETOOLONG)
# Long enough for the workers of a killed command, which share its lock, to end.
WAIT_SECONDS = 5.0


def relative_path(target: str | os.PathLike, folder: str | os.PathLike) -> str:
    """`target` as seen from `folder`, also where a link leads to either: the system looks for ".." behind a link."""
    path = Path(target)
    if path.name in ("", ".."):
        place = os.path.realpath(path)
    else:  # not the name itself, which may be a link that comes to lead elsewhere
        place = os.path.join(os.path.realpath(path.parent), path.name)
    return Path(os.path.relpath(place, os.path.realpath(folder))).as_posix()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """`valm_kernels.atomic_files.atomic_path` with errors for the user.

    Raises:
        ValmError: `path` cannot be written, such as on a full disk.
    """
    with write_errors(path), atomic_files.atomic_path(path) as temporary:
        yield temporary


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A temporary file whose content goes to the file `path` that a user named, all or nothing. An existing file
    keeps its mode, a link is followed, and a device or a pipe is written to: `atomic_path` replaces them, in a store.

    Raises:
        ValmError: `path` cannot be written.
    """
    with write_errors(path):
        if is_file(path) or not exists(path):
            with atomic_files.atomic_path(Path(os.path.realpath(path))) as temporary:
                if exists(path):  # before its content could be read by others
                    atomic_files.set_mode(temporary, stat.S_IMODE(_mode(path)) | stat.S_IWUSR)
                yield temporary
            return
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / "output"
            yield temporary
            with open(temporary, "rb") as content, open(path, "wb") as special:
                shutil.copyfileobj(content, special)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError while `path` is written into a ValmError.

    Raises:
        ValmError: `path` cannot be written.
    """
    try:
        yield
    except OSError as error:
        # numpy's error for a partial write has no errno, only a message
        reason = error.strerror or f"not all of it could be written ({error}); the disk may be full"
        raise ValmError(f"cannot write {path}: {reason}; what was there before is untouched") from error


@contextmanager
def only_writer(path: Path, otherwise: str) -> Iterator[None]:
    """Holds the lock of `path` (`valm_kernels.atomic_files.folder_lock`) until the block ends.

    Raises:
        ValmError: another process holds it; the message is `otherwise`.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(atomic_files.folder_lock(path, WAIT_SECONDS))
        except TimeoutError as error:
            raise ValmError(otherwise) from error
        yield  # outside of the try: the block may raise a TimeoutError of its own


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Writes `value` as JSON, indented or (None) in one line, all or nothing.

    Raises:
        ValmError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, what: str, schema: Any, remedy: str = "make it again") -> Any:
    """The JSON value in `path`, checked against `schema` (`valm_kernels.json_files`).

    Args:
        what: what the file is, for the error.
        remedy: what to do if it is damaged, for the error.

    Raises:
        ValmError: the file cannot be read or does not match the schema.
    """
    try:
        return json_files.read_json(path, schema)
    except OSError as error:
        raise ValmError(f"cannot read {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValmError(f"{what} {error}; {remedy}") from error


def read_yaml(path: Path, what: str) -> Any:
    """The YAML value in `path`.

    Args:
        what: what the file is, for the error.

    Raises:
        ValmError: the file cannot be read.
    """
    import yaml

    text = read_text(path)
    try:
        # a few lines of aliases of aliases would fill the memory
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValmError(f"{what} {path} has an alias (*NAME), which is not read: write the value itself")
        if (twice := next(_keys_given_twice(yaml.compose(text, yaml.SafeLoader)), None)) is not None:
            raise ValmError(f"{what} {path} has {short(twice)} twice: leave one out")  # PyYAML would take the last
        return yaml.safe_load(text)
    except ValmError:
        raise
    except Exception as error:  # a value that is none, such as 2026-99-99, makes PyYAML raise anything
        raise ValmError(f"{what} {path} cannot be read: {one_line(str(error))}") from error


def _keys_given_twice(node: Any) -> Iterator[Any]:
    """The keys that are twice in a mapping of a YAML document, given its root node."""
    if node is None or node.id == "scalar":
        return
    nodes = node.value
    if node.id == "mapping":
        keys = [key.value for key, _ in nodes]
        yield from (key for number, key in enumerate(keys) if key in keys[:number])
        nodes = [value for _, value in nodes]
    for inner in nodes:
        yield from _keys_given_twice(inner)


def read_text(path: str | os.PathLike) -> str:
    """The content of a UTF-8 text file, without a byte order mark.

    Raises:
        ValmError: it cannot be read, is no UTF-8 text, or is not a regular file.
    """
    check_regular(Path(path))
    try:
        content = Path(path).read_bytes()
        if reason := why_no_text(content):
            raise ValmError(f"{path} {reason}")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValmError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ValmError(f"cannot read {path}: {error.strerror}") from error


def is_folder(path: str | os.PathLike) -> bool:
    """Whether there is a folder `path`.

    Raises:
        ValmError: it cannot be looked at, such as without permission; to `os.path.isdir` there would be none.
    """
    return stat.S_ISDIR(_mode(path))


def is_file(path: str | os.PathLike) -> bool:
    """Whether there is a regular file `path`; errors as in `is_folder`."""
    return stat.S_ISREG(_mode(path))


def exists(path: str | os.PathLike) -> bool:
    """Whether there is anything at `path`; errors as in `is_folder`."""
    return status(path) is not None


def status(path: str | os.PathLike) -> os.stat_result | None:
    """What the system knows of what is at `path`; None if there is nothing. Errors as in `is_folder`."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValmError(f"cannot look at {short(os.fspath(path))}: {error.strerror}") from error
    except ValueError:  # a NUL in it
        return None


def _mode(path: str | os.PathLike) -> int:
    found = status(path)
    return found.st_mode if found else 0


def check_regular(path: Path) -> None:
    """Checks that `path` is a regular file or a link to one: opening a pipe would block.

    Raises:
        ValmError: it is not.
    """
    try:
        json_files.regular_file(path)
    except OSError as error:
        raise ValmError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValmError(str(error)) from error


def check_all_regular(folder: Path) -> None:
    """`check_regular` for all files in `folder` and its folders, for a library that chooses by itself which to open.

    Raises:
        ValmError: one is not a regular file.
    """
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if not path.is_dir() and path.exists():
            check_regular(path)


def is_transient(error: BaseException) -> bool:
    """True for errors of the machine (disk, permissions), not of the content: a retry may succeed."""
    return isinstance(error, OSError) and error.errno not in CONTENT_ERRORS


def cannot_read(name: object, reason: object) -> ValmError:
    """The error for a source that cannot be read now but may not be damaged (`is_transient`)."""
    return ValmError(f"cannot read {name}: {reason}; once it can be read, run the same command again: it resumes")


def files_below(folder: Path) -> list[str]:
    """Sorted paths of all files in `folder` and below, relative to it, with forward slashes; without hidden files and
    folders. Linked folders are looked into after all others: a folder that several paths lead to is read once, by its
    own path where that is below `folder`.

    Raises:
        ValmError: a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise cannot_read(f"the folder {error.filename}", error.strerror) from error

    names: list[str] = []
    visited: set[tuple[int, int]] = set()
    roots = [folder]
    for root in roots:  # to which links are added
        for directory, folders, files in os.walk(root, onerror=unreadable):
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in visited:
                folders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            below = [Path(directory) / name for name in folders]
            roots += [path for path in below if path.is_symlink()]
            here = (Path(directory) / name for name in files if not name.startswith("."))
            names += (file.relative_to(folder).as_posix() for file in here)
    return sorted(names)


def writable_folder(path: str | os.PathLike) -> Path:
    """The folder `path`, created if missing.

    Raises:
        ValmError: it cannot be created or is not writable.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValmError(f"cannot make the output folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValmError(f"cannot write into the output folder {path}: permission denied")
    return path


@contextmanager
def output_folder(path: str | os.PathLike) -> Iterator[Path]:
    """`writable_folder`, removed with its new parents if the block raises and has left it empty."""
    path = Path(path)
    made = [folder for folder in (path, *path.parents) if not exists(folder)]
    folder = writable_folder(path)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # it is not empty
            for new in made:
                new.rmdir()
        raise
