"""Trains the arm that `valm train` cannot train: captions as text before a document.

The options are those of a study's `training`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from studies.color.captions import Captions, captions_line
from studies.color.words import COLOR_WORDS, word_spans
from valm.clip.tokenizer import own_tokenizer, prompt_ids
from valm.corpus.retrieved import CorpusRetrieval
from valm.model.augment import augment
from valm.model.checkpoint import load_decoder
from valm.training.cache_below import cache_below
from valm.training.callbacks import show_progress
from valm.training.collate import IGNORED
from valm.training.mix import base_weights, mix
from valm.training.plan import TrainingPlan
from valm.training.train import trainer, training_arguments

# The key of a document that marks the tokens of its captions, which the loss ignores.
GIVEN = "given"


def train_with_captions(
    plan: TrainingPlan, texts: Sequence[str], retrieval: CorpusRetrieval, caption: Captions, progress: bool
) -> None:
    """Trains a text-only baseline on `texts`, each after the captions of its images in `retrieval`."""
    base = str(plan.base)
    tokenizer = own_tokenizer(base)
    documents = []
    for number, text in enumerate(texts):
        document = retrieval[number]
        line = captions_line(map(caption, images_before_color(text, document, tokenizer)))
        documents.append(with_captions(tokenizer, document["input_ids"], line))
    torch.manual_seed(plan.seed)
    model = augment(load_decoder(base), 1, 0, unfreeze="block")
    before = base_weights(model)
    training = trainer(
        model,
        cache_below(model, documents, str(plan.cache_below), progress=False),
        None,
        tokenizer=tokenizer,
        arguments=training_arguments(plan.out, **plan.training_fields()),
        limit_softmax=plan.limit_softmax,
    )
    training.data_collator = _WithoutCaptions(training.data_collator)
    show_progress(training, "train", progress)
    training.train()
    if plan.mix:
        mix(training, before, plan.mix)
    training.write(plan.out, tokenizer)


def study_plan(out: Path, base: str, seed: int, below: Path, settings: dict[str, Any]) -> TrainingPlan:
    """The plan that `valm train` would make of a study's settings."""
    numbers = {name: _number(value) for name, value in settings.items()}
    own = {one.name for one in dataclasses.fields(TrainingPlan)} & numbers.keys()
    fields = {name: value for name, value in numbers.items() if name not in own} | {"logging_steps": 1}
    plan = {name: numbers[name] for name in own}
    return TrainingPlan(out=out, base=base, seed=seed, cache_below=below, fields=fields, **plan)


def _number(value: Any) -> Any:
    """A setting as the command line of `valm train` parses it. YAML 1.1 parses 2e-4, without a point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def with_captions(tokenizer: Any, ids: Any, line: str) -> dict[str, np.ndarray]:
    """The document `ids`, which begins with bos, preceded by the captions of its images."""
    before = prompt_ids(tokenizer, line)  # with bos
    given = np.arange(len(before) + len(ids) - 1) < len(before)
    return {"input_ids": np.concatenate([before, np.asarray(ids)[1:]]).astype(np.int64), GIVEN: given}


def images_before_color(text: str, document: dict[str, Any], tokenizer: Any) -> list[int]:
    """The images of the token before the first colour word of `text`, or of the last token if no token precedes one."""
    ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
    color = next((span[0] for word, span in word_spans(text) if word in COLOR_WORDS), None)
    place = len(ends)  # of the last token, behind bos
    if color is not None:
        place = sum(end <= color for end in ends) or place
    return [int(image) for image in document["image_ids"][place] if image >= 0]


class _WithoutCaptions:
    """A collator whose labels exclude the GIVEN tokens."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, documents: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.collator(documents)
        for row, document in enumerate(documents):
            batch["labels"][row, np.flatnonzero(document[GIVEN])] = IGNORED
        return batch
