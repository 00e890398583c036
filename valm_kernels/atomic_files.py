"""Files and folders that appear whole or not at all: a temporary name, fsync, one rename.

A temporary name is NAME.<32 hex digits>.tmp. Its writer holds a lock (flock) on the file while it lives. A temporary
file without a lock belongs to a writer that was killed, and may be removed.
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


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, moved to it when the block succeeds and removed when it raises.

    If the process is killed, `path` holds either its old content or everything that was written. Several processes may
    write `path` at once; the last one wins.
    """
    with temporary_file(path) as temporary:
        yield temporary
        move(temporary, path)
    sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """`atomic_path` for a folder, which must not exist yet."""
    with temporary_folder(path) as temporary:
        yield temporary
        move_folder(temporary, path)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """An empty, locked folder beside `path`, removed when the block ends unless `move_folder` has moved it."""
    temporary, descriptor = _claim(path, Path.mkdir, os.O_RDONLY)
    try:
        yield temporary
    finally:
        _close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """An empty, locked file beside `path`, removed when the block ends unless `move` has moved it."""
    temporary, descriptor = _claim(path, lambda temporary: temporary.touch(exist_ok=False), os.O_RDWR)
    try:
        yield temporary
    finally:
        _close(descriptor)
        with suppress(OSError):
            os.unlink(temporary)


# Seconds that a save waits for another one in the same folder.
SAVE_WAIT_SECONDS = 60.0


@contextmanager
def folder_lock(path: Path, seconds: float) -> Iterator[None]:
    """Holds the lock of a folder that several processes may write; others wait for it until the block ends.

    Where there are no locks (Windows, some network file systems) nothing is waited for.

    Raises:
        TimeoutError: another process held the lock for longer than `seconds`.
    """
    descriptor = None if fcntl is None else os.open(path, os.O_RDONLY)
    try:
        if descriptor is not None:
            _wait_for_lock(descriptor, path, seconds)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):  # closed alone, it would stay with processes that were forked meanwhile
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _wait_for_lock(descriptor: int, path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process is writing there", os.fspath(path)) from None
            time.sleep(LOCK_INTERVAL)
        except OSError:  # no locks here
            return None


def move(temporary: Path, path: Path) -> None:
    """Moves a finished temporary file to `path`, after its content has reached the disk."""
    _sync(temporary)
    os.replace(temporary, path)


def move_folder(temporary: Path, path: Path) -> None:
    """`move` for a folder; one that exists at `path` is replaced. Its files get the mode that the umask says, which was
    that of the folder: safetensors makes its own for their owner alone."""
    mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
    for file in temporary.rglob("*"):
        if file.is_dir():
            sync_folder(file)
        else:
            _sync(file)
            set_mode(file, mode)
    sync_folder(temporary)
    old = temporary_name(path)
    with suppress(FileNotFoundError):
        os.replace(path, old)
    os.replace(temporary, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def set_mode(file: Path, mode: int) -> None:
    """Gives a file its mode, where the file system has modes."""
    if stat.S_IMODE(file.stat().st_mode) != mode:
        with suppress(PermissionError):
            file.chmod(mode)


def remove_folder(path: Path) -> None:
    """Removes a folder. If the process is killed meanwhile, what is left has a temporary name."""
    gone = temporary_name(path)
    os.replace(path, gone)
    shutil.rmtree(gone)


def sync_folder(path: Path) -> None:
    """Flushes the names in a folder to the disk."""
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
    """A unique name beside `path`."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is one of our temporary ones."""
    return TEMPORARY_NAME.fullmatch(name) is not None


def remove_leftovers(folder: Path, names: re.Pattern[str] = TEMPORARY_NAME) -> None:
    """Removes the temporary files and folders in `folder` whose writers were killed; ignores those it may not."""
    for path in list(folder.iterdir()):
        if is_temporary(path.name) and names.fullmatch(path.name):
            with suppress(OSError):
                remove_if_abandoned(path)


def remove_if_abandoned(path: Path) -> None:
    """Removes a file or folder that nobody has locked; without locks, one that is ABANDONED_SECONDS old."""
    found = path.lstat()
    is_folder = stat.S_ISDIR(found.st_mode)
    if not (is_folder or stat.S_ISREG(found.st_mode)):
        return  # we write nothing else
    remove: Callable[[Path], object] = shutil.rmtree if is_folder else os.unlink
    if fcntl is not None:
        # network file systems grant an exclusive lock only on a file opened for writing
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # no locks here
            pass
        else:
            remove(path)  # still locked: if its writer has just made it, `_claim` waits and then makes another
            return
        finally:
            os.close(descriptor)
    if time.time() - found.st_mtime > ABANDONED_SECONDS:
        remove(path)


def _claim(path: Path, make: Callable[[Path], None], flags: int) -> tuple[Path, int | None]:
    """Makes a temporary file or folder beside `path` by `make`; returns its name and the descriptor with its lock."""
    while True:
        temporary = temporary_name(path)
        make(temporary)
        descriptor = _locked(temporary, flags)
        if temporary.exists():  # not removed as abandoned before it was locked
            return temporary, descriptor
        _close(descriptor)


def _locked(path: Path, flags: int) -> int | None:
    """A descriptor that holds the lock of `path`; None without locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:  # removed as abandoned
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
