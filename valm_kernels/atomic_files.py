"""Files and folders that are whole or not there: a temporary name, fsync, one rename.

A temporary name is NAME.<32 hex digits>.tmp. Its writer holds a lock on it (flock) while it lives, so whoever finds a
temporary file without a lock knows that its writer was killed, and may remove it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY_NAME = re.compile(r".+\.[0-9a-f]{32}\.tmp")
# Where a file system has no locks, a temporary file as old as this has no writer any more.
ABANDONED_SECONDS = 24 * 3600


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, moved to it when the block ends well and removed when it does not.

    Killed at any point, `path` holds either what it held before or everything that was written. Several processes may
    write `path` at once: the last one's stays.
    """
    with temporary_file(path) as temporary:
        yield temporary
        move(temporary, path)
    sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which must not exist: as `atomic_path`."""
    with temporary_folder(path) as temporary:
        yield temporary
        move_folder(temporary, path)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, locked, and removed when the block ends unless it was moved by then
    (`move_folder`)."""
    temporary, descriptor = _claim(path, Path.mkdir, os.O_RDONLY)
    try:
        yield temporary
    finally:
        _close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, locked, and removed when the block ends unless it was moved by then (`move`)."""
    temporary, descriptor = _claim(path, lambda temporary: temporary.touch(exist_ok=False), os.O_RDWR)
    try:
        yield temporary
    finally:
        _close(descriptor)
        with suppress(OSError):
            os.unlink(temporary)


def move(temporary: Path, path: Path) -> None:
    """Moves a finished temporary file to `path`, its content written to the disk before its name."""
    _sync(temporary)
    os.replace(temporary, path)


def move_folder(temporary: Path, path: Path) -> None:
    """Moves a finished folder to `path`, in the place of one that is there, as `move` does a file."""
    for file in temporary.rglob("*"):
        if file.is_dir():
            sync_folder(file)
        else:
            _sync(file)
    sync_folder(temporary)
    old = temporary_name(path)
    with suppress(FileNotFoundError):
        os.replace(path, old)
    os.replace(temporary, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Has the names in a folder written to the disk."""
    if fcntl is None:  # Windows opens no folders
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):  # file systems that cannot sync a folder
            raise


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else has."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is temporary, whoever writes it."""
    return TEMPORARY_NAME.fullmatch(name) is not None


def remove_leftovers(folder: Path, names: re.Pattern[str] = TEMPORARY_NAME) -> None:
    """Removes the temporary files and folders in `folder` whose writers were killed, as far as that is allowed."""
    for path in list(folder.iterdir()):
        if is_temporary(path.name) and names.fullmatch(path.name):
            with suppress(OSError):
                _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    found = path.lstat()
    is_folder = stat.S_ISDIR(found.st_mode)
    if not (is_folder or stat.S_ISREG(found.st_mode)):
        return  # no writer of ours makes anything else
    remove: Callable[[Path], object] = shutil.rmtree if is_folder else os.unlink
    if fcntl is not None:
        # network file systems give an exclusive lock only to those who could write
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # no locks here
            pass
        else:
            remove(path)  # still locked: a writer that made it just now waits, and then makes another (`_claim`)
            return
        finally:
            os.close(descriptor)
    if time.time() - found.st_mtime > ABANDONED_SECONDS:
        remove(path)


def _claim(path: Path, make: Callable[[Path], None], flags: int) -> tuple[Path, int | None]:
    """A temporary name beside `path` of what `make` made, and the descriptor that holds its lock."""
    while True:
        temporary = temporary_name(path)
        make(temporary)
        descriptor = _locked(temporary, flags)
        if temporary.exists():  # nobody took it for abandoned before it was locked
            return temporary, descriptor
        _close(descriptor)


def _locked(path: Path, flags: int) -> int | None:
    """A descriptor that holds the lock of `path`, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:  # taken for abandoned
        return None
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _sync(file: Path) -> None:
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
