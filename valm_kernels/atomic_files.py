"""Files that appear whole or not at all: a temporary name, fsync, one rename.

A temporary name is NAME.<32 hex digits>.tmp. Its writer holds a lock (flock) on the file or folder while it lives. A
temporary file without a lock belongs to a writer that was killed, and may be removed.
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
# On a file system without locks, a temporary file this old counts as abandoned.
ABANDONED_SECONDS = 24 * 3600
# Seconds between two attempts to get a lock.
LOCK_INTERVAL = 0.05
# Seconds that a save waits for another one in the same folder.
SAVE_WAIT_SECONDS = 60.0


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file next to `path`, moved to it when the block succeeds and removed when the block raises.

    If the process is killed, `path` holds either its old content or everything that was written. Several processes may
    write `path` at once: the last one wins.

    Raises:
        OSError: the file cannot be written (for example, the disk is full); the error names `path`.
    """
    with temporary_file(path) as temporary:
        yield temporary
        move(temporary, path)
    sync_folder(path.parent)


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """An empty, locked file next to `path`, removed when the block ends unless `move` has moved it.

    Raises:
        OSError: the file cannot be written; the error names `path`.
    """
    with claimed(path, lambda temporary: temporary.touch(exist_ok=False)) as temporary:
        try:
            yield temporary
        finally:
            with suppress(OSError):
                os.unlink(temporary)


@contextmanager
def claimed(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A temporary file or folder next to `path`, made by `make` and locked until the block ends.

    Raises:
        OSError: the file cannot be made, or the block raised an OSError; if that names no file, it gets `path`.
    """
    with _naming(path):
        temporary, descriptor = _claim(path, make)
        try:
            yield temporary
        finally:
            _close(descriptor)


def _claim(path: Path, make: Callable[[Path], None]) -> tuple[Path, int | None]:
    while True:
        temporary = temporary_name(path)
        make(temporary)
        descriptor = _locked(temporary)
        if temporary.exists():  # not removed as abandoned before it was locked
            return temporary, descriptor
        _close(descriptor)


def move(temporary: Path, path: Path) -> None:
    """Moves a finished temporary file to `path`, after its content has reached the disk."""
    sync_file(temporary)
    os.replace(temporary, path)


def sync_file(path: Path) -> None:
    """Flushes the content of a file to the disk."""
    with open(path, "rb+") as opened:
        os.fsync(opened.fileno())


def sync_folder(path: Path) -> None:
    """Flushes the names in a folder to the disk."""
    if fcntl is None:  # Windows opens no folders
        return
    try:
        with _naming(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):  # file systems that cannot sync a folder
            raise


@contextmanager
def folder_lock(path: Path, seconds: float) -> Iterator[None]:
    """Holds the lock of a file or folder until the block ends; other processes wait for it.

    Without file locks (Windows, some network file systems) nobody waits.

    Raises:
        TimeoutError: another process held the lock for longer than `seconds`.
    """
    descriptor = None if fcntl is None else os.open(path, os.O_RDONLY)
    deadline = time.monotonic() + seconds
    try:
        while descriptor is not None and _lock(descriptor) is False:
            if time.monotonic() > deadline:
                reason = "another process is writing there; run this again when it has ended"
                raise TimeoutError(errno.ETIMEDOUT, reason, os.fspath(path))
            time.sleep(LOCK_INTERVAL)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):  # only closed, it would stay locked in processes forked meanwhile
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A unique name next to `path`."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def is_temporary(name: str) -> bool:
    """Whether this is a temporary name of this module."""
    return TEMPORARY_NAME.fullmatch(name) is not None


def remove_leftovers(folder: Path, names: re.Pattern[str] = TEMPORARY_NAME) -> None:
    """Removes temporary files and folders in `folder` whose writers were killed, if this process may."""
    for path in list(folder.iterdir()):
        if is_temporary(path.name) and names.fullmatch(path.name):
            with suppress(OSError):
                remove_if_abandoned(path)


def remove_if_abandoned(path: Path) -> None:
    """Removes a file or folder that nobody has locked or, without file locks, that is ABANDONED_SECONDS old."""
    found = path.lstat()
    if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
        return  # we write nothing else
    descriptor = None if fcntl is None else _open(path)
    try:
        locked = None if descriptor is None else _lock(descriptor)
        if locked or (locked is None and time.time() - found.st_mtime > ABANDONED_SECONDS):
            # still locked: if its writer has just made it, `claimed` waits and then makes another
            remove: Callable[[Path], object] = shutil.rmtree if stat.S_ISDIR(found.st_mode) else os.unlink
            remove(path)
    finally:
        _close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names `path` in an OSError that names a temporary file, or no file (write, fsync)."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # numpy raises this if a write was cut off
            reason = f"not all of it could be written ({error}); the disk may be full"
            raise OSError(errno.ENOSPC, reason, os.fspath(path)) from error
        if error.filename is None or is_temporary(os.path.basename(error.filename)):
            error.filename = os.fspath(path)
        raise


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a temporary file or folder. None: no file locks, or the file was removed."""
    if fcntl is None:
        return None
    try:
        descriptor = _open(path)
    except FileNotFoundError:
        return None
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _open(path: Path) -> int:
    # network file systems grant an exclusive lock only on a file opened for writing
    return os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Locks an open file or folder unless another process has locked it. None: the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
