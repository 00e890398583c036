"""Training on transformers' Trainer, with the same data in the same order for every model of one seed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from valm.checkpoint import save_checkpoint
from valm.corpus.retrieved import CorpusRetrieval
from valm.errors import ValmError
from valm.files import writable_folder
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model import VaLMForCausalLM
from valm.training.blocks import Blocks
from valm.training.collate import Collator


def train(
    model: VaLMForCausalLM,
    dataset: Sequence[dict],
    kb: ImageKnowledgeBase | None,
    output_dir: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int = 0,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    weight_decay: float = 0.01,
    clip_norm: float = 2.0,
    row_length: int | None = None,
    progress: str | None = "training",
) -> list[float]:
    """Trains `model` in place, writes it with its tokenizer to `output_dir` and returns the loss of every step.

    The documents of step i depend on the seed, the data's length and batch_size only, so GPT-2* and VaLM see the
    same. AdamW with betas (0.9, 0.98), as the paper trained.

    Args:
        dataset: documents as `Collator` takes them, such as a `CorpusRetrieval`. Those longer than the model's
            n_positions, or than row_length, are cut (see `Blocks`).
        kb: where the vectors of the documents' pictures are. None for num_images = 0 (image_ids are then not
            looked at) and for a model that has a retriever.
        batch_size: documents, or blocks of them, a step.
        schedule: of the learning rate after the warm-up, by its name in transformers ("cosine", "linear",
            "constant_with_warmup", "inverse_sqrt" as in the paper, ...).
        row_length: pack documents into rows of this length (see `Collator`); None pads.
        progress: what the progress bar is called, None for no bar.

    Raises:
        ValmError: model, data and knowledge base do not fit together, or output_dir cannot be written.
    """
    _check(model, dataset, kb, tokenizer)
    output_dir = writable_folder(output_dir)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type=schedule,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        max_grad_norm=clip_norm,
        adam_beta2=0.98,
        seed=seed,
        train_sampling_strategy="sequential",
        # what a small model would spend more time on than on its steps
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    # with several GPUs in one process the Trainer would cut each batch by rows, and image_pool has none
    arguments._n_gpu = min(1, arguments.n_gpu)
    limit = min(model.config.n_positions, row_length or model.config.n_positions)
    blocks = Blocks(dataset, limit, tokenizer.bos_token_id)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=torch.utils.data.Subset(blocks, _order(len(blocks), steps * batch_size, seed)),
        data_collator=Collator(tokenizer, kb, row_length),
        callbacks=[_ProgressBar(progress)] if progress else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()
    save_checkpoint(model, tokenizer, output_dir)
    return torch.stack(trainer.losses).tolist()


class _Trainer(Trainer):
    """Keeps the loss of every step, on the device, so that nothing has to wait for it."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.losses: list[torch.Tensor] = []

    def training_step(self, *arguments: Any, **more: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **more)
        self.losses.append(loss.detach())
        return loss


class _ProgressBar(TrainerCallback):
    """Steps a second and time left."""

    def __init__(self, name: str):
        self.name = name

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.name, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.close()


def _order(size: int, count: int, seed: int) -> list[int]:
    """The first `count` of the numbers below `size`, shuffled anew each time they are used up."""
    random = np.random.default_rng(seed)
    epochs = [random.permutation(size) for _ in range(-(-count // size))]
    return np.concatenate(epochs)[:count].tolist()


def _check(
    model: VaLMForCausalLM, dataset: Sequence[dict], kb: ImageKnowledgeBase | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = model.config
    if len(dataset) == 0:
        raise ValmError("there are no documents to train on")
    if len(tokenizer) != config.vocab_size:
        raise ValmError(f"the tokenizer has {len(tokenizer)} pieces, but the model's vocab_size is {config.vocab_size}")
    if kb is not None and config.num_images == 0:
        raise ValmError("a model with num_images = 0 (GPT-2*) sees no pictures: train it without a knowledge base")
    if kb is None and config.num_images > 0 and model.retriever is None:
        raise ValmError(f"this model sees {config.num_images} pictures a token: give a knowledge base or a retriever")
    if kb is not None and kb.dim != config.image_dim:
        raise ValmError(
            f"the knowledge base has vectors of dimension {kb.dim}, but the model's image_dim is {config.image_dim}"
        )
    if kb is not None and isinstance(dataset, CorpusRetrieval):
        dataset.check_knowledge_base(kb)
    if isinstance(dataset, CorpusRetrieval):
        dataset.verify_once()
    found = dataset[0].get("image_ids")
    if kb is not None and found is not None and found.shape[1] != config.num_images:
        raise ValmError(
            f"the documents have {found.shape[1]} pictures a token, but the model's num_images is {config.num_images}"
        )
