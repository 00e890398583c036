"""Folders that appear whole or not at all, and the folder of a model (checkpoint, adapter, CLIP), whose files are
replaced together: if the process is killed, the old or the new model loads."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from valm.errors import ValmError
from valm.store.files import set_mode, writable_folder
from valm.text import one_line
from valm_kernels.atomic_files import (
    SAVE_WAIT_SECONDS,
    claimed,
    folder_lock,
    move,
    remove_leftovers,
    sync_file,
    sync_folder,
    temporary_name,
)

# Holds completely written files until they have replaced the old files, of checkpoints, adapters and CLIPs.
NEW_FOLDER = "checkpoint.new"
# Weights of a checkpoint. transformers prefers one file to several, so stale weights are removed. So are an adapter,
# which would be loaded instead of the checkpoint, and the places of an old model's images.
WEIGHTS = "model*.safetensors*"
ADAPTER = "image_fusion.*"
# Where the images are. Uploads ignore names that begin with "_".
PLACES_FILE = "_retrieval.json"


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary, locked folder next to `path`, moved to it when the block succeeds, removed when the block raises."""
    with claimed(path, Path.mkdir) as temporary:
        try:
            yield temporary
            _move_folder(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _move_folder(temporary: Path, path: Path) -> None:
    """Moves a finished folder to `path`, where it replaces an old one. The files get the mode that the umask allows,
    like the folder: safetensors makes files that only their owner can read."""
    mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
    for file in temporary.rglob("*"):
        if file.is_dir():
            sync_folder(file)
        else:
            sync_file(file)
            set_mode(file, mode)
    sync_folder(temporary)
    old = temporary_name(path)
    with suppress(FileNotFoundError):
        os.replace(path, old)
    os.replace(temporary, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder. If the process is killed meanwhile, the rest of the folder has a temporary name."""
    gone = temporary_name(path)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def replaced_files(folder: str | os.PathLike, what: str) -> Iterator[Path]:
    """An empty folder whose files replace those of `folder` when the block ends without an error.

    The new folder appears whole as NEW_FOLDER in `folder`, and its files are then linked over the old files.

    Args:
        folder: created if missing. Its other files stay, except old weights, which are removed.
        what: what is written, for error messages.

    Raises:
        OSError: the folder cannot be written, or another process is writing it. The old files still load, or the new
            files if only the last step failed.
        ValmError: the block raised another error.
    """
    folder = writable_folder(folder)
    try:
        with folder_lock(folder, SAVE_WAIT_SECONDS):
            remove_leftovers(folder)
            _switch(folder)  # finishes an earlier save that was killed
            with atomic_folder(folder / NEW_FOLDER) as temporary:
                yield temporary
            _switch(folder)
    except (OSError, ValmError):
        raise
    except Exception as error:  # safetensors and tokenizers raise their own types for a full disk
        raise ValmError(f"cannot write {what} {folder}: {one_line(str(error))}") from error


def finish_save(folder: str | os.PathLike) -> None:
    """Finishes a killed save, whose files are whole in NEW_FOLDER of `folder`. Call it before you write other files
    there. Errors are those of `replaced_files`."""
    folder = Path(folder)
    if (folder / NEW_FOLDER).is_dir():
        with folder_lock(folder, SAVE_WAIT_SECONDS):
            _switch(folder)


def current_files(folder: Path) -> Path:
    """The folder of the model's files: NEW_FOLDER if the writer was killed while linking, otherwise `folder`."""
    return folder / NEW_FOLDER if (folder / NEW_FOLDER).is_dir() else folder


def _switch(folder: Path) -> None:
    """Links the files of NEW_FOLDER, if it exists, over the old ones, and removes it."""
    new = folder / NEW_FOLDER
    if not new.is_dir():
        return
    names = {file.relative_to(new).as_posix() for file in new.rglob("*") if file.is_file()}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        link(new / name, folder / name)
    whole, adapter = any(new.glob(WEIGHTS)), any(new.glob(ADAPTER))
    stale = [WEIGHTS, ADAPTER, PLACES_FILE] if whole else [PLACES_FILE] if adapter else []
    for file in [file for pattern in stale for file in folder.glob(pattern)]:
        if file.name not in names:
            file.unlink()
    sync_folder(folder)
    remove_folder(new)


def link(file: Path, target: Path) -> None:
    """Makes `target` the same file as `file`, atomically: a hard link, or a copy if the file system has no links."""
    temporary = temporary_name(target)
    try:
        os.link(file, temporary)
    except OSError:  # a file system without links
        shutil.copyfile(file, temporary)
    try:
        move(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # renaming a file to another link of itself does nothing
