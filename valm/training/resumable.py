"""Checks, before a training resumes, that its checkpoint is as it was written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from valm.errors import ValmError
from valm.files import read_json, write_json
from valm.text import one_line
from valm_kernels.checksums import file_sha256
from valm_kernels.json_files import Count, PathText, Sha256, own_file

# Written by the Trainer.
STATE_FILE = "trainer_state.json"
CHECKSUMS_FILE = "checksums.json"
REMEDY = "resume from an earlier checkpoint"


class _Logged(TypedDict):
    step: Count


class _OptionalState(TypedDict, total=False):
    best_global_step: Count | None
    best_metric: float | None
    best_model_checkpoint: PathText | None
    max_steps: Count


class _State(_OptionalState):
    """What is read of STATE_FILE, by the Trainer and here."""

    global_step: Count
    epoch: float | None
    log_history: list[_Logged]


def write_checksums(folder: Path) -> None:
    """Notes the SHA-256 of every file in the checkpoint `folder`, which is complete except for this note."""
    write_json(folder / CHECKSUMS_FILE, {name: file_sha256(file) for name, file in sorted(_files(folder).items())})


def check_resumable(folder: Path) -> int | None:
    """Reads the whole checkpoint `folder` and compares it with its checksums.

    Checkpoints of earlier versions have none: only the state of the training is checked then.

    Returns:
        How many steps its training was to have, None if it does not say.

    Raises:
        ValmError: a file is not as it was written, or is a pipe or a link out of the folder.
    """
    if not folder.is_dir():
        raise ValmError(f"there is no checkpoint {folder}")
    files = _files(folder)
    for file in files.values():
        try:
            own_file(file)
        except ValueError as error:
            raise ValmError(f"cannot resume from {folder}: {error}") from error
    if CHECKSUMS_FILE in files:
        noted = read_json(files[CHECKSUMS_FILE], "the checksums", dict[str, Sha256], REMEDY)
        damaged = [name for name, sha256 in noted.items() if name not in files or file_sha256(files[name]) != sha256]
        if damaged:
            raise ValmError(f"the checkpoint {folder} is damaged ({one_line(damaged[0])}); {REMEDY}")
    state: _State = read_json(folder / STATE_FILE, "the state of the training", _State, REMEDY)
    return state.get("max_steps")


@contextmanager
def resume_errors(folder: object) -> Iterator[None]:
    """Turns the errors of PyTorch and transformers for a damaged file of the checkpoint `folder` into a ValmError."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise ValmError(f"cannot resume from {folder}: {reason}") from error


def _files(folder: Path) -> dict[str, Path]:
    """Every file in `folder` and below it, by its path relative to `folder`."""
    return {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if not file.is_dir()}
