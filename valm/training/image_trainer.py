"""transformers' Trainer with one order for any number of processes, whole checkpoints and exact perplexity."""

from __future__ import annotations

import copy
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import SchedulerType, Trainer
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from valm.errors import ValmError, is_out_of_memory
from valm.model.card import write_card
from valm.model.checkpoint import save_checkpoint
from valm.model.image_model import ImageModel
from valm.retrieval.source import write_places
from valm.store.files import is_file, is_folder, is_transient, writable_folder
from valm.store.pretrained import quiet_transformers
from valm.training.launch import check_processes
from valm.training.next_token_loss import NextTokenLoss
from valm.training.order import TrainingOrder
from valm_kernels.atomic_files import atomic_path
from valm_kernels.json_files import check_own

log = logging.getLogger(__name__)

# A part of the names of the parameters that only see images.
FUSION_NAME = ".image_fusion."
# Written by the Trainer, the state at the end.
STATE_FILE, SCHEDULER_FILE = "trainer_state.json", "scheduler.pt"
OPTIMIZER_FILES = {"optimizer.pt", "optimizer.bin"}
# Written by DeepSpeed, whose own files have the optimizer and the learning rates.
DEEPSPEED_FILE = "latest"
CHECKPOINT = re.compile(f"{PREFIX_CHECKPOINT_DIR}-([0-9]+)")
ARGUMENTS = "the training arguments do not fit"

_Arguments: Any = object  # for a type checker, the class behind the mixin


@contextmanager
def library_errors(what: str = ARGUMENTS, still: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Takes what a library raises in the block, while `still` is true, as the reason for the sentence `what`.

    Raises:
        ValmError: in place of any other error but that of a file, or of too little memory.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValmError) or is_transient(error) or is_out_of_memory(error) or not still():
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        first, *more = str(error).strip().split("\n")
        reason = more[-1].strip() if first.endswith(":") and more else first  # a heading, and a line for each weight
        raise ValmError(f"{what}: {kind}{reason}") from error


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in `folder` that was written to its end, as its last file, STATE_FILE, says."""
    found = {int(name[1]): file for file in folder.iterdir() if (name := CHECKPOINT.fullmatch(file.name))}
    return next((str(found[step]) for step in sorted(found, reverse=True) if is_file(found[step] / STATE_FILE)), None)


def check_resumable(checkpoint: Path) -> None:
    """Checks that a training can go on from a checkpoint.

    Raises:
        OSError: it, or something in it, is a link out of its folder.
        ValmError: there is none, or it has the model alone.
    """
    files = {file.name for file in checkpoint.iterdir()} if is_folder(checkpoint) else set()
    if STATE_FILE not in files:
        raise ValmError(f"there is no checkpoint {checkpoint}: it has no {STATE_FILE}")
    for path in (checkpoint, *checkpoint.rglob("*")):
        check_own(path)
    whole = SCHEDULER_FILE in files and files & OPTIMIZER_FILES
    if not whole and DEEPSPEED_FILE not in files:  # the Trainer would begin anew with either, without a word
        raise ValmError(
            f"the checkpoint {checkpoint} has a model without its optimizer or learning rates, as save_only_model "
            "makes it: resume from an earlier checkpoint, or begin a new training"
        )


class ImageTrainer(Trainer):
    """A `Trainer`, made by `valm.training.trainer`.

    - Data are read in a `TrainingOrder` (with train_sampling_strategy "random"; other strategies are the Trainer's).
    - A loss that is not finite stops the training before its step is taken.
    - A checkpoint is whole when its STATE_FILE is there. Nothing in it or in an upload names a folder of this machine.
    - Evaluation weighs every token equally, in any batch, and adds the perplexity.

    Args:
        prepared: makes of documents what eval_dataset is, for those that `evaluate` and `predict` are given.
        fusion_lr: learning rate of the parameters that only see images; None = that of all others.
        options: the Trainer's.
    """

    def __init__(
        self,
        *,
        prepared: Callable[[Any], Any],
        fusion_lr: float | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        if not isinstance(self.args, _WithoutFolders):  # as those of another trainer are
            self.args.__class__ = type(type(self.args).__name__, (_WithoutFolders, type(self.args)), {})
        check_processes(self.args)
        self.fusion_lr = fusion_lr
        self._prepared = prepared
        self.numbers: dict[str, float] = {}  # for the model card, in place of those that were logged
        self._order: TrainingOrder | None = None
        self._batch = (-1, 0)  # the step that is being done, and which of its batches
        self._scored = (0.0, 0.0)  # of the evaluation so far: sum of the losses of tokens, and how many

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`.

        Raises:
            ValmError: the folder holds another training's checkpoints; the one to resume from is damaged, or has more
                steps than this training; what a library raises before the first step; a loss is not finite; a
                checkpoint cannot be written.
        """
        folder = writable_folder(str(self.args.output_dir))
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if resume_from_checkpoint and "SHARDED" in str(getattr(plugin, "state_dict_type", "")):
            raise ValmError("PyTorch would unpickle a SHARDED_STATE_DICT: set FULL_STATE_DICT in fsdp_config")
        last = newest_checkpoint(folder)
        if resume_from_checkpoint:
            if resume_from_checkpoint is True and last is None:
                raise ValmError(f"{folder} holds no checkpoint to resume from")
            resume_from_checkpoint = str(last if resume_from_checkpoint is True else resume_from_checkpoint)
            check_resumable(Path(resume_from_checkpoint))
        elif last is not None:
            raise ValmError(f"{folder} holds the checkpoints of another training: resume it, or choose another folder")
        what = f"cannot resume from {resume_from_checkpoint}" if resume_from_checkpoint else ARGUMENTS
        try:
            with library_errors(what, lambda: self._batch[0] < 0):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:  # otherwise an error would be printed after an open bar
                bar = getattr(callback, "training_bar", None)
                if bar is not None:
                    bar.close()

    def losses(self) -> list[float]:
        """The logged losses; with logging_steps=1, of every step."""
        return [entry["loss"] for entry in self.state.log_history if "loss" in entry]

    def held_out_loss(self) -> float:
        """The mean loss of a token of eval_dataset, which is not logged; all processes call it, after the training."""
        self.is_in_train = True  # otherwise bf16_full_eval would change the type of the weights
        try:
            loader = self.get_eval_dataloader()
            output = self.evaluation_loop(loader, description="Evaluation", prediction_loss_only=True)
        finally:
            self.is_in_train = False
        metrics: Any = output.metrics
        return metrics["eval_loss"]

    def model_numbers(self) -> dict[str, float]:
        """What was logged or measured of the model that `write` writes: `steps` after which, and losses and the like.

        If the best checkpoint became the model, later numbers belong to another one.
        """
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        step = self.state.global_step if best is None else int(best.rpartition("-")[2])
        numbers = {"steps": float(step)}
        for entry in self.state.log_history:  # the last of each stays
            if entry["step"] <= step:
                numbers |= {name: entry[name] for name in entry if _is_of_model(name)}
        return numbers | self.numbers

    def write(self, folder: Any, tokenizer: Any, *, command: str | None = None) -> None:
        """Writes the trained model into `folder`, whole or not at all, with a card that has its losses and `command`;
        all processes call it (`save_checkpoint`)."""
        state = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            numbers = self.model_numbers()
            save_checkpoint(model, tokenizer, folder, state_dict=state, numbers=numbers, command=command)
        self.accelerator.wait_for_everyone()

    # ---- what the Trainer calls ----

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        planned = self.state.max_steps
        if resume_from_checkpoint is not None:
            # the Trainer forgets a best checkpoint whose folder had another name when it was written
            noted = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / STATE_FILE))
            planned = noted.max_steps
            self.state.best_model_checkpoint = self._best_checkpoint(noted.best_model_checkpoint)
        self.state.__class__ = _WholeState
        # those of now: the Trainer takes the intervals of saving, evaluating and logging from the checkpoint
        self.state.compute_steps(self.args, max_steps)
        step = self.state.global_step
        if step > max_steps:
            raise ValmError(
                f"the checkpoint is at step {step}, but the training is to end at step {max_steps}: give at least "
                f"{step} steps (--steps, max_steps), or resume from an earlier checkpoint"
            )
        if step > 0 and planned != max_steps and self.is_world_process_zero():
            schedule = SchedulerType(self.args.lr_scheduler_type).value
            log.warning(
                f"the training goes on to step {max_steps}, not to step {planned} as before: from here the "
                f"learning rate is that of the {schedule} schedule over {max_steps} steps"
            )
        return found

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # the Trainer looks only after a step
            super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        step_rows = self.get_total_train_batch_size(self.args)
        self._order = TrainingOrder(
            len(dataset),
            step_rows,
            seed,
            lambda: self.state.global_step,
            max_steps=self.args.max_steps,
            passes=getattr(dataset, "passes", False),
        )
        return self._order

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The Trainer's, with its own generator: otherwise each epoch and each evaluation would draw a random number
        from the generator of the model's dropout."""
        loader: Any = super()._get_dataloader(*args, **kwargs)
        seed = int(torch.empty((), dtype=torch.int64).random_()) if kwargs.get("is_training") else 0
        loader.base_dataloader.generator = torch.Generator().manual_seed(seed)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        given = eval_dataset is not None and not isinstance(eval_dataset, str) and eval_dataset is not self.eval_dataset
        return super().get_eval_dataloader(self._prepared(eval_dataset) if given else eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return super().get_test_dataloader(self._prepared(test_dataset))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's, with separate groups for the parameters that have `fusion_lr`."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.fusion_lr is None or given:
            return optimizer
        trained: Any = self.model if model is None else model
        fusion = {id(parameter) for name, parameter in trained.named_parameters() if FUSION_NAME in name}
        for group in list(optimizer.param_groups):
            new = [parameter for parameter in group["params"] if id(parameter) in fusion]
            if new:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in fusion]
                optimizer.add_param_group({**group, "params": new, "lr": self.fusion_lr})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        step, batch = self._batch
        self._batch = (self.state.global_step, batch + 1 if step == self.state.global_step else 0)
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise ValmError(self._not_finite(float(loss)))
        return loss

    def _not_finite(self, loss: float) -> str:
        step, batch = self._batch
        accumulated = self.args.gradient_accumulation_steps
        place = f"step {step + 1}" + (f", batch {batch + 1} of its {accumulated}" if accumulated > 1 else "")
        if self.args.world_size > 1:
            place += f", process {self.args.process_index}"
        if self._order is not None:
            size = self._train_batch_size
            first = step * self._order.step_rows + (batch * self.args.world_size + self.args.process_index) * size
            place += f" (rows {', '.join(map(str, self._order.rows(first, first + size)))} of the data)"
        return (
            f"the loss is {loss} at {place}: training stops before this step, and no model is written; a lower "
            "learning rate or a longer warm-up may help"
        )

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        trained = self.compute_loss_func
        if isinstance(trained, NextTokenLoss):  # without what smooths it
            self.compute_loss_func = NextTokenLoss()
        try:
            result = super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self.compute_loss_func = trained
        loss = result[0]
        # the loss is a mean over the tokens of all processes' batches, times their number
        tokens = self._get_num_items_in_batch([inputs], self.args.device)
        if loss is not None and tokens is not None and tokens > 0:
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            count = float(tokens) / processes
            self._scored = (self._scored[0] + float(loss) * count, self._scored[1] + count)
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._scored = (0.0, 0.0)
        output = super().evaluation_loop(*args, **kwargs)
        metrics: Any = output.metrics
        prefix = kwargs.get("metric_key_prefix", "eval")
        scored = torch.tensor(self._scored, dtype=torch.float64)
        if self.args.world_size > 1:
            scored = self.accelerator.gather(scored[None].to(self.args.device)).sum(dim=0)
        total, tokens = scored.tolist()
        if tokens > 0:
            loss = total / tokens
            metrics[f"{prefix}_loss"] = loss
            metrics[f"{prefix}_perplexity"] = math.exp(min(loss, 700))
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (checkpoint / STATE_FILE).unlink(missing_ok=True)  # of another training: it is not whole meanwhile
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # torch and safetensors raise their own types for a full disk
            reason = str(error).strip().partition("\n")[0]
            last = newest_checkpoint(folder)
            if last == str(checkpoint):  # what failed came after it, such as an upload
                raise
            remedy = "there is no earlier one" if last is None else f"{last} is whole: resume from there"
            raise ValmError(f"cannot write the checkpoint {checkpoint}: {reason}; {remedy}") from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state, which makes a checkpoint whole, is written next

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.should_save and isinstance(self.model, ImageModel):
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with quiet_transformers():
            super()._save(output_dir, state_dict)
        if self.args.should_save and isinstance(self.model, ImageModel):
            write_places(self.model.finder.source, str(self.args.output_dir))  # where each checkpoint looks for them

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """That of a model with images says what it needs."""
        if isinstance(self.model, ImageModel):
            write_card(self.model, str(self.args.output_dir), numbers=self.model_numbers())
        else:
            super().create_model_card(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(self.lr_scheduler, LambdaLR):
            # the schedule of now: the checkpoint has the learning rates of the training that wrote it
            schedule = self.lr_scheduler
            groups = schedule.optimizer.param_groups
            for group, base, of_step in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                group["lr"] = base * of_step(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in groups]

    def _best_checkpoint(self, noted: str | None) -> str | None:
        """The best checkpoint's folder in output_dir, by its name alone: `noted` may be elsewhere, or of before a move.

        Raises:
            ValmError: it is not there, and is to become the model.
        """
        if noted is None:
            return None
        found = Path(str(self.args.output_dir)) / Path(noted).name
        if CHECKPOINT.fullmatch(found.name) and found.is_dir():
            return str(found)
        if self.args.load_best_model_at_end:
            raise ValmError(
                f"the best checkpoint so far, {found}, is missing: put it back, or begin a new training elsewhere"
            )
        return None

    def _load_best_model(self) -> None:
        self.state.best_model_checkpoint = self._best_checkpoint(self.state.best_model_checkpoint)
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Checks the loaded weights, where the Trainer would only warn.

        Raises:
            ValmError: a weight would have another value than was saved.
        """
        model: Any = self.model
        tied = model._tied_weights_keys or ()  # they are saved under one name
        wrong = [name for name in load_result.missing_keys if name not in tied] + load_result.unexpected_keys
        if wrong:
            raise ValmError(f"the checkpoint is of another model than this {type(model).__name__}: {wrong[0]}")


class _WholeState(TrainerState):
    """A TrainerState whose file appears whole, and names no folder of this machine."""

    def save_to_json(self, json_path: str) -> None:
        best = self.best_model_checkpoint
        self.best_model_checkpoint = None if best is None else Path(best).name
        try:
            with atomic_path(Path(json_path)) as temporary:
                super().save_to_json(str(temporary))
        finally:
            self.best_model_checkpoint = best


class _WithoutFolders(_Arguments):
    """Mixin of TrainingArguments, which the Trainer saves, reports and uploads: as a dict, also in a pickle, they have
    the last part of each path."""

    def __copy__(self) -> Any:
        made: Any = object.__new__(type(self))
        vars(made).update(vars(self))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made: Any = copy.copy(self)
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict().items()
        return {name: Path(value).name if _is_path(value) else value for name, value in fields}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self.to_dict(),)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and os.sep in value


def _is_of_model(name: str) -> bool:
    """Whether a logged number is about the model, not the machine."""
    return name == "loss" or (name.startswith("eval_") and not name.endswith(("runtime", "per_second")))
