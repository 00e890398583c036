"""What a training is, noted in its folder: `_run.json`, which a resumed one compares."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from valm.corpus.retrieved import CorpusRetrieval
from valm.corpus.texts import fingerprint
from valm.errors import ValmError
from valm.model.config import WEIGHTS_KEY
from valm.model.sketch import other_tensor, project
from valm.store.files import WAIT_SECONDS, read_json, write_json
from valm.store.settings import check_same
from valm.training.image_trainer import ImageTrainer, newest_checkpoint
from valm_kernels.atomic_files import SAVE_WAIT_SECONDS, folder_lock, is_temporary, remove_leftovers

RUN_FILE = "_run.json"  # uploads ignore names that begin so
LOGS = "runs"  # of TensorBoard
# Prefixes of fields that a resumed training may change: they change neither the data nor the weights after a step, or
# say how many steps there are, or which checkpoint becomes the model, or were measured at the end.
FREE_FIELDS = (
    *("dataloader_", "ddp_", "disable_tqdm", "eval_", "hub_", "load_best_", "log", "max_steps", "num_train_epochs"),
    *("numbers", "push_", "report_to", "restore_callback_states", "run_name", "save_", "use_cpu"),
)
# The options of what RUN_FILE has under other names.
OPTIONS = {
    "learning_rate": "lr",
    "step_rows": "batch-size",
    "fusion_lr": "fusion-lr",
    "limit_softmax": "limit-softmax",
    "image_dropout": "image-dropout",
    "validation_data": "validation",
    "model.n_positions": "context",
    "model.layer": "layer",
    "model.unfreeze": "unfreeze",
    "model.logit_bias": "logit-bias",
    "model.score_scale": "score-scale",
    "model.min_score": "min-score",
}


def begun_checkpoint(out: Path, resume: bool, writes: bool) -> str | None:
    """The checkpoint in `out` to resume from, None to start; `writes`: whether it is this process that writes to `out`.

    A training that ended before its first checkpoint has nothing to resume or to lose: its note is removed.

    Raises:
        ValmError: `out` holds something, and no training is to be resumed in it; or not that of a training; or another
            process trains there.
    """
    if writes:  # the others may find what this one has written
        remove_leftovers(out)
        found = [file.name for file in out.iterdir() if not is_temporary(file.name)]
        if (out / RUN_FILE).is_file() and {*found} <= {RUN_FILE, LOGS}:
            with only_training(out):
                (out / RUN_FILE).unlink()
            return None
        if found and not resume:
            raise ValmError(f"the output folder {out} is not empty: choose another, or give --resume to continue in it")
        if found and RUN_FILE not in found:
            raise ValmError(f"{out} holds no training that could be resumed (it has no {RUN_FILE}): choose another")
    return newest_checkpoint(out) if resume else None


def only_training(out: Path) -> AbstractContextManager[None]:
    """Keeps other processes from training in `out`, whose training is noted, until the block ends.

    Raises:
        TimeoutError: another process trains there.
    """
    return folder_lock(out / RUN_FILE, WAIT_SECONDS)


def note_run(out: Path, training: ImageTrainer, dataset: Any, settings: Mapping[str, Any]) -> None:
    """Notes in the folder `out` what `training` is, unless the same is noted there.

    Args:
        dataset: all its documents, with those that are held out.
        settings: what neither `training` nor its model says, and the fields of TrainingArguments that were given. The
            first one that differs is named, so what others follow from comes first.

    Raises:
        ValmError: the folder has the note of another one.
    """
    file = out / RUN_FILE
    model: Any = training.model
    # what a step reads is `step_rows`, and no number of an evaluation depends on its batches
    batches = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")
    run = {
        **{name: value for name, value in settings.items() if name not in batches},
        "base": getattr(model.config, "fusion", {}).get("sketch"),
        "fusion_lr": training.fusion_lr,
        "step_rows": training.get_total_train_batch_size(training.args),
        **model_settings(model.config),
        "data": content_of(dataset),
    }
    run = {name: value for name, value in run.items() if not name.startswith(FREE_FIELDS)}
    if file.is_file():
        before = read_json(file, "the note on a training", dict[str, Any], "choose another folder")
        if before.get("validation_data") is not None and run.get("validation_data") is not None:
            before["validation"] = run["validation"]  # its content is compared, wherever it is
        compare(out, model, before, run)
    elif training.is_world_process_zero():
        with folder_lock(out, SAVE_WAIT_SECONDS):
            if file.exists():
                raise ValmError(f"another process has started a training in {out}: choose another folder")
            write_json(file, run)


def note_numbers(out: Path, training: ImageTrainer) -> None:
    """Adds to the note in `out` what was measured after `training`."""
    if training.is_world_process_zero():
        run = read_json(out / RUN_FILE, "the note on a training", dict[str, Any], "choose another folder")
        write_json(out / RUN_FILE, run | {"numbers": training.numbers})


def compare(out: Path, model: Any, before: dict[str, Any], run: dict[str, Any]) -> None:
    """Compares `run` with what RUN_FILE in `out` says, `before`.

    Raises:
        ValmError: they differ; the message names the option.
    """
    if (run["base"] is None) != (before.get("base") is None):
        kind = "a pretrained decoder (--base)" if run["base"] is None else "a new model, without --base"
        raise ValmError(f"{out} holds the training of {kind}; choose another folder")
    if run["base"] is not None and (other := other_base_tensor(model, before["base"])) is not None:
        raise ValmError(
            f"{out} holds the training of another base model: {other} had other values; choose another folder"
        )
    there, here = ({name: of[name] for name in of if name not in ("base", "numbers")} for of in (before, run))
    check_same(f"{out} holds another training", there, here, "choose another folder", option_of)


def other_base_tensor(model: Any, noted: Any) -> str | None:
    """The name of a tensor of the base that is not as RUN_FILE has noted it in a sketch, None if there is none."""
    return other_tensor(project(model, noted), noted) if isinstance(noted, dict) else "every tensor"


def option_of(name: str) -> str:
    """What a user calls the setting `name` of RUN_FILE."""
    if name in OPTIONS:
        return f"--{OPTIONS[name]}" + (" of all processes together" if name == "step_rows" else "")
    return name if name.startswith("model.") or name == "data" else f"--{name}"


def model_settings(config: Any) -> dict[str, Any]:
    """All that the config says of the model, of an augmented one its base's and the fusion's together."""
    found = config.to_diff_dict()
    found.pop("retrieval", None)  # the data have its hashes
    found |= {**found.pop("base_config", {}), **found.pop("fusion", {})}
    return {
        f"model.{name}": found[name] for name in found if "version" not in name and name not in ("sketch", WEIGHTS_KEY)
    }


def content_of(dataset: Any) -> str:
    """A hash of all the documents."""
    if isinstance(dataset, CorpusRetrieval):
        return dataset.fingerprint
    return fingerprint([document["input_ids"] for document in dataset])
