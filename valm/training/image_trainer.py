"""transformers' Trainer with one data order for any number of processes, whole checkpoints and exact perplexity."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from valm.errors import ValmError
from valm.model.adapter import is_adapter, load_weights, save_adapter
from valm.model.attention import IMAGE_ARGUMENTS
from valm.model.augment import AugmentedCausalLM
from valm.model.card import write_card
from valm.model.checkpoint import save_checkpoint, with_length
from valm.model.image_model import ImageModel
from valm.retrieval.source import write_places
from valm.store.files import writable_folder
from valm.store.folders import ADAPTER, link
from valm.store.pretrained import quiet_transformers
from valm.text import one_line
from valm.training.cache_below import no_images
from valm.training.launch import check_processes
from valm.training.order import TrainingOrder
from valm_kernels.json_files import check_own

# Part of the names of parameters that only see images.
FUSION_NAME = ".image_fusion."
# The Trainer writes these files; the state is last.
STATE_FILE, SCHEDULER_FILE, TRAINING_ARGS_NAME = "trainer_state.json", "scheduler.pt", "training_args.bin"
OPTIMIZER_FILES = {"optimizer.pt", "optimizer.bin"}
# DeepSpeed writes this file; its own files contain the optimizer and the learning rates.
DEEPSPEED_FILE = "latest"
CHECKPOINT = re.compile(f"{PREFIX_CHECKPOINT_DIR}-[0-9]+")


def newest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in `folder`: it contains STATE_FILE, which is written last."""
    found = {step_of(file.name): file for file in folder.iterdir() if CHECKPOINT.fullmatch(file.name)}
    return next((str(found[step]) for step in sorted(found, reverse=True) if _is_whole(found[step])), None)


def step_of(checkpoint: str) -> int:
    """The step of the checkpoint folder."""
    return int(checkpoint.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    file = checkpoint / STATE_FILE
    try:
        return file.is_file() and isinstance(json.loads(file.read_bytes()), dict)
    except (ValueError, RecursionError):  # half-written or damaged
        return False


def check_resumable(checkpoint: Path) -> None:
    """Checks that a training can resume from a checkpoint.

    Raises:
        OSError: the checkpoint, or a file in it, is a link out of its folder.
        ValmError: there is no checkpoint, or it contains only the model.
    """
    files = {file.name for file in checkpoint.iterdir()} if checkpoint.is_dir() else set()
    if STATE_FILE not in files:
        raise ValmError(f"there is no checkpoint {checkpoint}: it contains no {STATE_FILE}")
    for path in (checkpoint, *checkpoint.rglob("*")):
        check_own(path)
    whole = SCHEDULER_FILE in files and files & OPTIMIZER_FILES
    if not whole and DEEPSPEED_FILE not in files:  # the Trainer would silently start again
        raise ValmError(
            f"the checkpoint {checkpoint} contains a model without its optimizer or learning rates (save_only_model): "
            "resume from an earlier checkpoint, or start a new training"
        )


class ImageTrainer(Trainer):
    """The `Trainer` that `valm.training.trainer` makes. It promises more than transformers' Trainer:

    - Data are read in a `TrainingOrder` (with train_sampling_strategy "random"; other strategies are the Trainer's).
      So the losses of the steps are the same for any number of processes, and in a resumed training. The first loss
      that a resumed training logs is the mean since the resume, as in the Trainer.
    - A loss that is not finite stops the training before its step.
    - Resuming skips a half-written checkpoint: STATE_FILE is written last.
    - Evaluation weights every token equally, in any batch, and adds the perplexity.
    - A checkpoint loads with its images, and what is published names its images.

    The docstring of an overriding method names the promise it keeps.

    Args:
        prepared: prepares documents that `evaluate` and `predict` are given as eval_dataset was prepared.
        options: the Trainer's.
    """

    def __init__(self, *, prepared: Callable[[Any], Any] = lambda documents: documents, **options: Any):
        super().__init__(**options)
        check_processes(self.args)
        self._prepared = prepared
        self.numbers: dict[str, float] = {}  # for the model card, besides the logged numbers
        self._scored = (0.0, 0.0)  # of the evaluation so far: sum of the tokens' losses, number of tokens

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`. Resumes from the newest complete checkpoint, without unpickling anything in it. Starts no
        training in a folder with another training's checkpoints.

        Raises:
            ValmError: the folder contains another training's checkpoints; the checkpoint to resume from contains only
                the model; or a loss is not finite.
        """
        folder = writable_folder(str(self.args.output_dir))
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if resume_from_checkpoint and "SHARDED" in str(getattr(plugin, "state_dict_type", "")):
            raise ValmError("PyTorch would unpickle a SHARDED_STATE_DICT: set FULL_STATE_DICT in fsdp_config")
        last = newest_checkpoint(folder)
        if resume_from_checkpoint:
            if resume_from_checkpoint is True and last is None:
                raise ValmError(f"{folder} contains no checkpoint to resume from")
            resume_from_checkpoint = str(last if resume_from_checkpoint is True else resume_from_checkpoint)
            check_resumable(Path(resume_from_checkpoint))
        elif last is not None:
            raise ValmError(f"{folder} contains another training's checkpoints: resume it, or choose another folder")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def losses(self) -> list[float]:
        """The logged losses; with logging_steps=1, the loss of every step."""
        return [entry["loss"] for entry in self.state.log_history if "loss" in entry]

    def perplexity_without_images(self) -> float:
        """The perplexity of eval_dataset if the model sees no images: the base's, if only parameters that see images
        train. It is not logged. All processes call it, after the training."""
        model: Any = self.model
        hook = model.register_forward_pre_hook(_drop_images, with_kwargs=True)
        self.is_in_train = True  # otherwise bf16_full_eval would change the weights' dtype
        try:
            loader = self.get_eval_dataloader()
            output = self.evaluation_loop(loader, description="Evaluation", prediction_loss_only=True)
        finally:
            self.is_in_train = False
            hook.remove()
        metrics: Any = output.metrics
        return metrics["eval_perplexity"]

    def model_numbers(self) -> dict[str, float]:
        """Numbers of the model that `write` writes: `steps`, losses and the like.

        If the best checkpoint became the model, numbers that were logged after it are left out.
        """
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        step = self.state.global_step if best is None else step_of(best)
        numbers = {"steps": float(step)}
        for entry in self.state.log_history:  # keeps the last of each
            if entry["step"] <= step:
                numbers |= {name: entry[name] for name in entry if _is_of_model(name)}
        return numbers | self.numbers

    def write(self, folder: Any, tokenizer: Any, *, command: str | None = None) -> None:
        """Writes the trained model into `folder` completely or not at all, with a card that shows its losses and
        `command`: an adapter if its base is known and did not train, else the whole model. All processes call it
        (`save_adapter`, `save_checkpoint`)."""
        state = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if self.args.should_save:
            shown: Any = {"numbers": self.model_numbers(), "command": command}
            if adapted := self._adapted():
                save_adapter(adapted, folder, tokenizer=with_length(tokenizer, adapted), **shown)
            else:
                model = self.accelerator.unwrap_model(self.model)
                save_checkpoint(model, tokenizer, folder, state_dict=state, **shown)
        self.accelerator.wait_for_everyone()

    def _adapted(self) -> Any:
        """The model if it is saved as an adapter, because its base is known and only parameters that see images train;
        else None. FSDP and DeepSpeed load whole models."""
        model: Any = self.model
        divided = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if divided or not isinstance(model, AugmentedCausalLM) or not model.config.base_place:
            return None
        trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
        return model if all(FUSION_NAME in name for name in trained) else None

    # ---- what the Trainer calls ----

    def _init_training_state(
        self, max_steps: int, epoch_steps: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Resuming: finds the best checkpoint in a renamed folder, and takes the intervals of saving, evaluating and
        logging from the present arguments, not from the checkpoint."""
        found = super()._init_training_state(max_steps, epoch_steps, epochs, checkpoint, trial)
        if checkpoint is not None:
            noted = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))
            self.state.best_model_checkpoint = self._best_checkpoint(noted.best_model_checkpoint)
        self.state.compute_steps(self.args, max_steps)
        return found

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """The data order."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        step_rows = self.get_total_train_batch_size(self.args)
        return TrainingOrder(len(dataset), step_rows, seed, lambda: self.state.global_step, self.args.max_steps)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Resuming, by a separate generator for the loader: otherwise each epoch and each evaluation would advance the
        generator of the model's dropout."""
        loader: Any = super()._get_dataloader(*args, **kwargs)
        seed = int(torch.empty((), dtype=torch.int64).random_()) if kwargs.get("is_training") else 0
        loader.base_dataloader.generator = torch.Generator().manual_seed(seed)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Evaluation: prepares documents that `evaluate` is given as `eval_dataset` was prepared."""
        given = eval_dataset is not None and not isinstance(eval_dataset, str) and eval_dataset is not self.eval_dataset
        return super().get_eval_dataloader(self._prepared(eval_dataset) if given else eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Evaluation: prepares the documents of `predict`."""
        return super().get_test_dataloader(self._prepared(test_dataset))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raises ValmError if the loss is not finite, before the step is taken."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise ValmError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1}: training stops before this step and "
                "writes no model. Try a lower learning rate or a longer warm-up"
            )
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluation: counts the tokens of each batch."""
        result = super().prediction_step(model, inputs, *args, **kwargs)
        loss = result[0]
        # the loss is a mean over the tokens of all processes' batches, times the number of processes
        tokens = self._get_num_items_in_batch([inputs], self.args.device)
        if loss is not None and tokens is not None and tokens > 0:
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            count = float(tokens) / processes
            self._scored = (self._scored[0] + float(loss) * count, self._scored[1] + count)
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluation: the mean over the tokens of all processes, and the perplexity."""
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
        """Whole checkpoints: an older checkpoint is marked incomplete while it is overwritten. A full disk raises one
        sentence. Raises ValmError if the checkpoint cannot be written."""
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (checkpoint / STATE_FILE).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # torch and safetensors raise their own types for a full disk
            if _is_whole(checkpoint):  # a later step failed, such as an upload
                raise
            raise ValmError(f"cannot write the checkpoint {checkpoint}: {one_line(str(error))}") from error

    def _save_rng_state(self, output_dir: str) -> None:
        """Whole checkpoints: waits until all processes have written their parts, before STATE_FILE is written."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _best_checkpoint(self, noted: str | None) -> str | None:
        """The best checkpoint's folder in output_dir. Only the name of `noted` counts, since the folder may have moved.
        Raises ValmError if the folder is missing, and the checkpoint is to become the model."""
        if noted is None:
            return None
        found = Path(str(self.args.output_dir)) / Path(noted).name
        if CHECKPOINT.fullmatch(found.name) and found.is_dir():
            return str(found)
        if self.args.load_best_model_at_end:
            raise ValmError(
                f"the best checkpoint so far, {found}, is missing: put it back, or start a new training elsewhere"
            )
        return None

    def _load_best_model(self) -> None:
        """Raises if the best checkpoint is missing; the Trainer would use the last weights."""
        best = self._best_checkpoint(self.state.best_model_checkpoint)
        self.state.best_model_checkpoint = best
        if best is not None and is_adapter(Path(best)):
            self._load_from_checkpoint(best)
        else:
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Checkpoints that are adapters contain only what trained."""
        if is_adapter(Path(resume_from_checkpoint)):
            trained: Any = self.model
            load_weights(trained, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint contains tied weights once: the Trainer would warn that their second name is missing."""
        tied: Any = getattr(self.model, "all_tied_weights_keys", ())
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Checkpoints load with their images: writes the paths of the images, once for all checkpoints. Without a
        training of the base, a checkpoint is an adapter."""
        if adapted := self._adapted():
            if self.args.should_save:
                folder = Path(output_dir or str(self.args.output_dir))
                tokenizer: Any = self.processing_class
                save_adapter(adapted, folder, tokenizer=tokenizer)
                torch.save(self.args, folder / TRAINING_ARGS_NAME)
            return
        with quiet_transformers():
            super()._save(output_dir, state_dict)
        if self.args.should_save and isinstance(self.model, ImageModel):
            write_places(self.model.finder.source, str(self.args.output_dir))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publishing: each upload gets the card, which names the images, and the adapter if the checkpoint is one."""
        if self.args.should_save and isinstance(self.model, ImageModel):
            self.create_model_card()
            for file in Path(checkpoint_folder).glob(ADAPTER):
                link(file, Path(str(self.args.output_dir)) / file.name)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Publishing: the card names the images, and no folder of this machine."""
        if isinstance(self.model, ImageModel):
            folder, with_base = str(self.args.output_dir), self._adapted() is None
            write_card(self.model, folder, numbers=self.model_numbers(), with_base=with_base)
        else:
            super().create_model_card(*args, **kwargs)


def without_images(model: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `model`, changed so that no token sees an image."""
    others = {name: value for name, value in call.items() if name not in IMAGE_ARGUMENTS}
    return others | no_images(model, call["input_ids"])


def _drop_images(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, without_images(model, kwargs)


def _is_of_model(name: str) -> bool:
    """Whether a logged number describes the model rather than the machine."""
    return name == "loss" or (name.startswith("eval_") and not name.endswith(("runtime", "per_second")))
