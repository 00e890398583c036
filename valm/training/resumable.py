"""Checks, before a training resumes, that its checkpoint is as it was written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from transformers.trainer_callback import TrainerState
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.store.files import Count, Sha256, is_folder, read_json, write_json
from valm.text import one_line
from valm_kernels.checksums import file_sha256
from valm_kernels.json_files import check_own

# Written by the Trainer.
STATE_FILE, SCHEDULER_FILE = "trainer_state.json", "scheduler.pt"
# Written by DeepSpeed, whose own files have the optimizer and the learning rates.
DEEPSPEED_FILE = "latest"
CHECKSUMS_FILE = "checksums.json"
REMEDY = "resume from an earlier checkpoint"


# The files that PyTorch, transformers, accelerate or DeepSpeed read; others may be the user's own notes.
READ = re.compile(r".*\.(json|pt|pth|bin|safetensors|distcp|metadata)|(.*/)?latest")
BestCheckpoint = Annotated[str, Field(pattern="checkpoint-[0-9]+$")]


class _Logged(TypedDict):
    step: Count


class _OptionalState(TypedDict, total=False):
    best_global_step: Count | None
    best_metric: float | None
    total_flos: float
    num_input_tokens_seen: Count
    train_batch_size: Count | None
    stateful_callbacks: dict[str, Any]
    best_model_checkpoint: BestCheckpoint | None
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

    Returns:
        How many steps its training was to have, None if it does not say.

    Raises:
        OSError: a file, or the folder itself, is a link out of its folder, or cannot be read.
        ValmError: a file is not as it was written or has no checksum; or the folder has the model alone.
    """
    if not is_folder(folder):
        raise ValmError(f"there is no checkpoint {folder}")
    files = _files(folder)
    for file in (folder, *files.values()):
        check_own(file)
    noted = read_json(folder / CHECKSUMS_FILE, "the checksums", dict[str, Sha256], REMEDY)
    damaged = [name for name, sha256 in noted.items() if name not in files or file_sha256(files[name]) != sha256]
    unknown = sorted(name for name in files if name not in noted and name != CHECKSUMS_FILE and READ.fullmatch(name))
    if unknown:
        found = one_line(unknown[0])
        raise ValmError(f"the checkpoint {folder} has no checksum of {found} in {CHECKSUMS_FILE}; {REMEDY}")
    if damaged:
        raise ValmError(f"the checkpoint {folder} is damaged ({one_line(damaged[0])}); {REMEDY}")
    if not files.keys() & {SCHEDULER_FILE, DEEPSPEED_FILE}:  # the Trainer would begin anew with both, without a word
        raise ValmError(
            f"the checkpoint {folder} has a model without its optimizer and learning rates ({SCHEDULER_FILE}), as "
            f"save_only_model makes it: {REMEDY}, or begin a new training"
        )
    state: _State = read_json(folder / STATE_FILE, "the state of the training", _State, REMEDY)
    with resume_errors(folder):
        TrainerState.load_from_json(str(folder / STATE_FILE))  # which refuses names that it does not know
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
    """Every file and link in `folder` and below it, by its path relative to `folder`."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix(): path for path in found}
