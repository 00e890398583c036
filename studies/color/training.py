"""Trains the arms that `valm train` does not have: captions as text before a document, and late fusion.

Both take the options of a study's `training`, hold out the same documents as `valm train --validation` would, and end
with the weights that predict these best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from studies.color.captions import Captions, captions_line
from studies.color.late_fusion import add_late_fusion, save_late_fusion
from studies.color.words import COLOR_WORDS, word_spans
from valm.clip.tokenizer import own_tokenizer, prompt_ids
from valm.corpus.retrieved import CorpusRetrieval
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.model.augment import augment
from valm.model.checkpoint import load_decoder
from valm.training.cache_below import cache_below
from valm.training.callbacks import show_progress
from valm.training.collate import IGNORED
from valm.training.data import hold_out
from valm.training.image_trainer import ImageTrainer
from valm.training.mix import SHARES, base_weights, mix
from valm.training.plan import PATIENCE, TrainingPlan, validation_of
from valm.training.train import trainer, training_arguments

# Of a document with captions before it, whose tokens are nothing to be predicted.
GIVEN = "given"
# The layer that `augment` fuses at, before which all models are the same, so that they read the same files.
FUSION_LAYER = -2
NO_CHECKPOINTS = {"save_strategy": "no", "load_best_model_at_end": False, "logging_steps": 1}
# Fields of `TrainingPlan`; other settings are fields of TrainingArguments.
PLAN_FIELDS = ("steps", "batch_size", "context", "lr", "validation", "patience")
OTHER_OPTIONS = ("fusion_lr", "limit_softmax", "logit_bias")


def train_with_captions(
    out: Path,
    *,
    base: str,
    texts: Sequence[str],
    retrieval: CorpusRetrieval,
    caption: Captions,
    settings: dict[str, Any],
    seed: int,
    below: Path,
    progress: bool,
) -> ImageTrainer:
    """Trains a text-only twin on `texts`, before each the captions of the images that `retrieval` has for it."""
    tokenizer = own_tokenizer(base)
    documents = []
    for number, text in enumerate(texts):
        document = retrieval[number]
        line = captions_line(map(caption, images_before_color(text, document, tokenizer)))
        documents.append(with_captions(tokenizer, document["input_ids"], line))
    torch.manual_seed(seed)
    model = augment(load_decoder(base), 1, 0, unfreeze="block")
    training = _trainer(model, documents, None, tokenizer, settings, out, seed, below)
    before = base_weights(model)
    _train(training, "train", progress)
    training.numbers |= mix(training, before, SHARES)
    training.write(out, tokenizer)
    return training


def train_late_fusion(
    out: Path,
    *,
    base: str,
    retrieval: CorpusRetrieval,
    kb: ImageKnowledgeBase,
    settings: dict[str, Any],
    seed: int,
    below: Path,
    progress: bool,
) -> ImageTrainer:
    """Trains late fusion on `retrieval`; nothing of the base trains, so nothing is mixed."""
    torch.manual_seed(seed)
    model = add_late_fusion(base, kb.dim, retrieval.k)
    training = _trainer(model, retrieval, kb, own_tokenizer(base), settings, out, seed, below)
    _train(training, "train", progress)
    save_late_fusion(model, out)
    return training


def with_captions(tokenizer: Any, ids: Any, line: str) -> dict[str, np.ndarray]:
    """The document `ids`, which begins with bos, after the captions of its images."""
    before = prompt_ids(tokenizer, line)  # with bos
    given = np.arange(len(before) + len(ids) - 1) < len(before)
    return {"input_ids": np.concatenate([before, np.asarray(ids)[1:]]).astype(np.int64), GIVEN: given}


def images_before_color(text: str, document: dict[str, Any], tokenizer: Any) -> list[int]:
    """The images of the token before the first colour word of `text`; of its last token if there is none before one."""
    ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
    color = next((span[0] for word, span in word_spans(text) if word in COLOR_WORDS), None)
    place = len(ends)  # of the last token, behind bos
    if color is not None:
        place = sum(end <= color for end in ends) or place
    return [int(image) for image in document["image_ids"][place] if image >= 0]


class KeepBest(TrainerCallback):
    """Keeps the weights of the evaluation with the lowest loss, and ends the training after `patience` others."""

    def __init__(self, patience: int):
        self.patience = patience
        self.loss, self.step, self.worse = float("inf"), 0, 0
        self.weights: dict[str, Tensor] = {}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self.worse += 1
        if more["metrics"]["eval_loss"] < self.loss:
            self.loss, self.step, self.worse = more["metrics"]["eval_loss"], state.global_step, 0
            self.weights = {name: one.detach().clone() for name, one in _trained(more["model"])}
        control.should_training_stop |= 0 < self.patience <= self.worse

    @torch.no_grad()
    def restore(self, model: torch.nn.Module) -> None:
        """Gives `model` the weights that were kept."""
        for name, parameter in _trained(model):
            parameter.copy_(self.weights[name])


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, one) for name, one in model.named_parameters() if one.requires_grad]


class _WithoutCaptions:
    """A collator whose labels are the documents' own tokens, without what is GIVEN."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, documents: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.collator(documents)
        for row, document in enumerate(documents):
            batch["labels"][row, np.flatnonzero(document[GIVEN])] = IGNORED
        return batch


def _trainer(
    model: Any, documents: Any, kb: Any, tokenizer: Any, settings: dict[str, Any], out: Path, seed: int, below: Path
) -> ImageTrainer:
    settings = {name: _number(value) for name, value in settings.items()}
    plan_fields = {name: value for name, value in settings.items() if name in PLAN_FIELDS}
    fields = {name: value for name, value in settings.items() if name not in (*PLAN_FIELDS, *OTHER_OPTIONS)}
    plan = TrainingPlan(out=out, base="base", seed=seed, fields=fields, **plan_fields)
    arguments = training_arguments(out, **plan.training_fields() | NO_CHECKPOINTS)
    trained, evaluated = documents, None
    if plan.validation is not None:
        share = validation_of(plan.validation)
        if not isinstance(share, float):
            raise ValmError(f"validation in a study is the share of the documents to hold out, not {share}")
        trained, held_out = hold_out(documents, share, seed)
        evaluated = cache_below(model, held_out, below, layer=FUSION_LAYER, progress=False)
    training = trainer(
        model,
        cache_below(model, trained, below, layer=FUSION_LAYER, progress=False),
        kb,
        tokenizer=tokenizer,
        arguments=arguments,
        eval_dataset=evaluated,
        fusion_lr=None if kb is None else settings.get("fusion_lr"),
        limit_softmax=settings.get("limit_softmax", False),
        callbacks=[KeepBest(PATIENCE if plan.patience is None else plan.patience)],
    )
    if kb is None:
        training.data_collator = _WithoutCaptions(training.data_collator)
    return training


def _number(value: Any) -> Any:
    """A setting as the command line of `valm train` reads it: YAML 1.1 takes 2e-4, without a point, for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _train(training: ImageTrainer, name: str, progress: bool) -> None:
    """Trains, and ends with the best weights of the evaluations."""
    show_progress(training, name, progress)
    training.train()
    best = next(one for one in training.callback_handler.callbacks if isinstance(one, KeepBest))
    if best.weights:
        model: Any = training.model
        best.restore(model)
        training.numbers |= {"eval_loss": best.loss, "eval_perplexity": math.exp(best.loss), "steps": best.step}
