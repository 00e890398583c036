"""Notes what a training is in its folder (`_run.json`), so that a resumed training can compare it."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from valm.corpus.retrieved import CorpusRetrieval
from valm.corpus.texts import fingerprint
from valm.errors import ValmError
from valm.model.sketch import other_tensor
from valm.store.files import WAIT_SECONDS, read_json, write_json
from valm.store.settings import check_same
from valm.training.image_trainer import ImageTrainer, newest_checkpoint
from valm.training.plan import TrainingPlan, validation_of
from valm_kernels.atomic_files import SAVE_WAIT_SECONDS, folder_lock, is_temporary, remove_leftovers

RUN_FILE = "_run.json"  # uploads ignore names that begin with _
LOGS = "runs"  # of TensorBoard
# Fields of the plan that a resumed training may change, or whose content is compared in another way ...
FREE = {
    *("allow_download", "base", "batch_size", "cache_below", "corpus", "fields", "kb", "ordinary_text", "out"),
    *("patience", "questions", "resume", "retrieval", "steps", "tokenizer"),
}
# ... and prefixes of such fields of TrainingArguments: they change neither the data nor the weights after a step, or
# determine the number of steps or which checkpoint becomes the model, or are part of `step_rows`.
FREE_FIELDS = (
    *("dataloader_", "ddp_", "disable_tqdm", "eval_", "gradient_accumulation", "hub_", "load_best_", "log"),
    *("max_steps", "num_train_epochs", "per_device_", "push_", "report_to", "restore_callback_states", "run_name"),
    *("save_", "use_cpu"),
)
# Options that RUN_FILE contains under other names.
OPTIONS = {"data": "data", "step_rows": "--batch-size of all processes together"}
REMEDY = "choose another folder"


def begun_checkpoint(out: Path, resume: bool, writes: bool) -> str | None:
    """The checkpoint in `out` to resume from; None to start. writes: whether this process writes to `out`.

    If a training ended before its first checkpoint, its note is removed: there is nothing to resume.

    Raises:
        ValmError: `out` is not empty, and no training is to be resumed or contained in it; or another process trains
            there.
    """
    if writes:  # other processes may see files that this process has written
        remove_leftovers(out)
        found = [file.name for file in out.iterdir() if not is_temporary(file.name)]
        if (out / RUN_FILE).is_file() and {*found} <= {RUN_FILE, LOGS}:
            with only_training(out):
                (out / RUN_FILE).unlink()
            return None
        if found and not resume:
            raise ValmError(f"the output folder {out} is not empty: choose another, or give --resume to continue in it")
        if found and RUN_FILE not in found:
            raise ValmError(f"{out} contains no training to resume (it contains no {RUN_FILE}): choose another folder")
    return newest_checkpoint(out) if resume else None


def only_training(out: Path) -> AbstractContextManager[None]:
    """Within the block, keeps other processes from training in `out`, whose training is noted. Raises TimeoutError if
    another process trains there."""
    return folder_lock(out / RUN_FILE, WAIT_SECONDS)


def note_run(out: Path, plan: TrainingPlan, training: ImageTrainer, dataset: Any, held_out: Any) -> None:
    """Notes in the folder `out` what decides the steps of `training`, or compares it with the note there.

    Args:
        dataset: all documents, including held-out documents.

    Raises:
        ValmError: the note belongs to another training; the message names the first option that differs.
    """
    file = out / RUN_FILE
    model: Any = training.model
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan) if field.name not in FREE}
    fields |= {name: value for name, value in plan.fields.items() if not name.startswith(FREE_FIELDS)}
    validation = None if plan.validation is None else validation_of(plan.validation)
    run = fields | {
        "kb": None if plan.kb is None else "given",  # the data cover its content
        "model": "x".join(map(str, plan.size())) if plan.base is None else None,
        "min_score": model.fusion_options.min_score,
        "lr": plan.learning_rate(),
        "validation": content_of(held_out) if isinstance(validation, Path) else validation and str(validation),
        "step_rows": training.get_total_train_batch_size(training.args),
        "data": content_of(dataset),
        "base": getattr(model.config, "fusion", {}).get("sketch"),
    }
    if file.is_file():
        before = read_json(file, "the note on a training", dict[str, Any], REMEDY)
        _compare_bases(out, before.pop("base", None), run.pop("base"))
        before.pop("numbers", None)
        check_same(f"{out} contains another training", before, run, REMEDY, _option_of)
    elif training.is_world_process_zero():
        with folder_lock(out, SAVE_WAIT_SECONDS):
            if file.exists():
                raise ValmError(f"another process has started a training in {out}: {REMEDY}")
            write_json(file, run)


def note_numbers(out: Path, training: ImageTrainer) -> None:
    """Adds the numbers that were measured after `training` to the note in `out`."""
    if training.is_world_process_zero():
        run = read_json(out / RUN_FILE, "the note on a training", dict[str, Any], REMEDY)
        write_json(out / RUN_FILE, run | {"numbers": training.numbers})


def _compare_bases(out: Path, before: Any, now: Any) -> None:
    if (now is None) != (before is None):
        kind = "a pretrained decoder (--base)" if now is None else "a new model, without --base"
        raise ValmError(f"{out} contains the training of {kind}: {REMEDY}")
    if now is not None and (other := other_tensor(now, before)) is not None:
        raise ValmError(f"{out} contains the training of another base model ({other} differs): {REMEDY}")


def _option_of(name: str) -> str:
    """The option for the setting `name` of RUN_FILE."""
    own = name in TrainingPlan.__dataclass_fields__
    return OPTIONS.get(name) or f"--{name.replace('_', '-') if own else name}"


def content_of(dataset: Any) -> str:
    """A hash of all documents."""
    if isinstance(dataset, CorpusRetrieval):
        return dataset.fingerprint
    return fingerprint([document["input_ids"] for document in dataset])
