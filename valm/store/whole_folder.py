"""Replaces all files of a model (checkpoint, adapter, CLIP) at once: the old or the new one loads after any kill."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from valm.errors import ValmError
from valm.store.files import is_folder, writable_folder
from valm.text import utf8
from valm_kernels.atomic_files import (
    SAVE_WAIT_SECONDS,
    atomic_folder,
    folder_lock,
    move,
    remove_leftovers,
    sync_folder,
    temporary_name,
)

# Holds completely written files until they have replaced the old ones; named when only checkpoints had it.
NEW_FOLDER = "checkpoint.new"
# Weights of a checkpoint. transformers prefers one file to several, so stale ones are removed. So are an adapter, which
# would be loaded in the place of the checkpoint, and the places of the images of a model that was there.
WEIGHTS = "model*.safetensors*"
ADAPTER = "image_fusion.*"
# Where the images are. Uploads ignore names that begin so.
PLACES_FILE = "_retrieval.json"


@contextmanager
def replaced_files(folder: str | os.PathLike, what: str) -> Iterator[Path]:
    """An empty folder whose files replace those of `folder` when the block ends without an error.

    It appears whole as NEW_FOLDER in `folder`, and its files are then linked over the old ones.

    Args:
        folder: created if missing. Its other files stay, except for weights that the new ones lack.
        what: names what is written in error messages.

    Raises:
        ValmError: the folder's name is not UTF-8; or it cannot be written, not all of it, or another process is writing
            it; or the block raises any exception. What was there before still loads; if only the last step failed,
            what is new does.
    """
    if os.fspath(folder) != utf8(os.fspath(folder)):  # as Python holds bytes that are not UTF-8
        raise ValmError(
            f"cannot write {what} {os.fspath(folder)!a}: the name is not UTF-8 text, so safetensors could not open the "
            "weights again; choose another"
        )
    folder = writable_folder(folder)
    try:
        with folder_lock(folder, SAVE_WAIT_SECONDS):
            remove_leftovers(folder)
            _switch(folder)  # where an earlier save was killed
            with atomic_folder(folder / NEW_FOLDER) as temporary:
                yield temporary
            _switch(folder)
    except ValmError:
        raise
    except TimeoutError as error:
        raise ValmError(f"cannot write {what} {folder}: another process is writing there") from error
    except Exception as error:  # a full disk has a type of its own in safetensors, and in tokenizers
        reason = str(error).strip().partition("\n")[0]
        raise ValmError(f"cannot write {what} {folder}: {reason}; what it held before is untouched") from error


def finish_save(folder: str | os.PathLike) -> None:
    """Moves what a killed save has left whole in NEW_FOLDER of `folder`, before other files are written there.

    Raises:
        ValmError: another process is writing the folder, or the files cannot be moved.
    """
    folder = Path(folder)
    if not is_folder(folder / NEW_FOLDER):
        return
    try:
        with folder_lock(folder, SAVE_WAIT_SECONDS):
            _switch(folder)
    except TimeoutError as error:
        raise ValmError(f"cannot write {folder}: another process is writing there") from error


def current_files(folder: Path) -> Path:
    """The folder of the model's files: NEW_FOLDER if the writer was killed while linking, as some files in `folder` are
    then old."""
    return folder / NEW_FOLDER if is_folder(folder / NEW_FOLDER) else folder


def _switch(folder: Path) -> None:
    """Links the files of NEW_FOLDER, if it exists, over the old ones, and removes it."""
    new = folder / NEW_FOLDER
    if not new.is_dir():
        return
    try:
        names = {file.relative_to(new).as_posix() for file in new.rglob("*") if file.is_file()}
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _link(new / name, folder / name)
        whole, adapter = any(new.glob(WEIGHTS)), any(new.glob(ADAPTER))
        stale = [WEIGHTS, ADAPTER, PLACES_FILE] if whole else [PLACES_FILE] if adapter else []
        for file in [file for pattern in stale for file in folder.glob(pattern)]:
            if file.name not in names:
                file.unlink()
        sync_folder(folder)
        finished = temporary_name(new)
        os.replace(new, finished)
    except OSError as error:
        raise ValmError(
            f"what was saved is whole in {new} and loads from there, but its files cannot be moved to {folder}: "
            f"{error.strerror}; save it again"
        ) from error
    shutil.rmtree(finished, ignore_errors=True)


def _link(file: Path, target: Path) -> None:
    """Makes `target` a link to `file`, atomically."""
    temporary = temporary_name(target)
    try:
        os.link(file, temporary)
    except OSError:  # a file system without links
        shutil.copyfile(file, temporary)
    try:
        move(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # renaming a file to another link of itself does nothing
