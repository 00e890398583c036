"""Estimates the time, disk and memory that `valm pictures` needs on this machine, from a few timed steps."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from valm.clip.clip import Clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer, tokenize_documents
from valm.errors import ValmError
from valm.knowledge_base.records import Record
from valm.model.augment import augment
from valm.model.checkpoint import load_decoder
from valm.pictures.making import CLIP, Found, Making
from valm.pictures.plan import BATCH_SIZE, EVALUATIONS, HELD_OUT
from valm.retrieval.context import ContextEncoder
from valm.store.parts import CONTROL, KB, MODEL, RETRIEVAL
from valm.training.base_divergence import BaseDivergence
from valm.training.cache_below import cache_below
from valm.training.clip import CaptionedImages, new_clip, shrunk, train_clip
from valm.training.clip_plan import SMALL
from valm.training.collate import Collator
from valm.training.limited_softmax import LimitedSoftmax
from valm.training.plan import BASE_KL

# Pictures and steps that are timed, and the batch size of a CLIP.
PICTURES, STEPS, CLIP_BATCH = 8, 2, 128
IMAGES, CONTEXT = 4, 512  # of a token, and tokens of a document
REPORT_TOKENS = 200  # that the report generates, about
ALONE = 12  # time of a generated token, which loads every weight, compared with a token of a batch
THUMBNAIL_BYTES = 6000
# An adapter, two checkpoints of it with the optimizer's two moments, and the gradients' own: float32 numbers of each
# trained parameter that one training leaves.
NUMBERS_A_TRAINING = 10


class Estimate(NamedTuple):
    """The seconds of each stage, the bytes on the disk, and what was found out about the decoder.

    Attributes:
        memory: bytes at least: the most that the timed steps have used, and the weights once more, which the report
            opens.
        fast: names of the options of `TrainingPlan` that make its training faster, of those that it supports.
    """

    seconds: dict[str, float]
    disk: float
    memory: float
    parameters: int
    architecture: str
    fast: list[str]


def estimate(making: Making, tokenizer: PreTrainedTokenizerFast) -> Estimate:
    """Times a few steps of every stage.

    Raises:
        ValmError: the decoder cannot see images, or a picture or the CLIP cannot be used.
    """
    found, plan = making.found, making.plan
    texts = found.texts[:: max(1, len(found.texts) // BATCH_SIZE)][:BATCH_SIZE]
    documents = tokenize_documents(texts, tokenizer)
    tokens = sum(map(len, documents)) / len(documents) * len(found.texts)
    documents = [document[:CONTEXT] for document in documents]
    seconds = {}
    if plan.clip is None:
        clip, each = _small_clip(found)
        seconds[CLIP] = each * plan.steps_of_clip(len(found.captioned))
    else:
        clip = Clip.load(plan.clip)
        seconds[CLIP] = 0.0
    seconds[KB] = _timed(lambda: _encode(clip, found.records)) / PICTURES * len(found.records)
    encoder = ContextEncoder(clip, tokenizer=tokenizer)
    of_texts = _timed(lambda: [encoder(torch.tensor([ids])) for ids in documents])
    seconds[RETRIEVAL] = of_texts / len(texts) * len(found.texts)
    base = _Base(making, documents, tokenizer, clip.embed_dim)
    steps = plan.training_steps(len(found.texts))
    batches = (EVALUATIONS + 1) * max(1.0, HELD_OUT * len(found.texts) / BATCH_SIZE)
    training = 2 * base.loading + steps * base.step + batches * base.evaluation
    seconds[MODEL] = training + base.below * tokens
    seconds[CONTROL] = training
    seconds["report"] = base.loading + REPORT_TOKENS * base.token
    clip_bytes = sum(4.0 * parameter.numel() for parameter in clip.model.parameters())
    disk = clip_bytes + len(found.records) * (2 * clip.embed_dim + THUMBNAIL_BYTES) + tokens * (8 + 8 * IMAGES)
    disk += tokens * 4 * base.width + 2 * NUMBERS_A_TRAINING * 4 * base.trained
    if Path(making.base).parent == making.out:  # the converted decoder
        disk += 4 * base.parameters
    memory = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 4.0 * base.parameters
    return Estimate(seconds, disk, memory, base.parameters, base.architecture, base.fast)


class _Base:
    """Times of the decoder: loading it, a step of training, an evaluated batch, and a token below and through it."""

    def __init__(self, making: Making, documents: list[list[int]], tokenizer: PreTrainedTokenizerFast, dim: int):
        start = time.perf_counter()
        model: Any = augment(load_decoder(making.base), image_dim=dim, num_images=IMAGES, logit_bias=0.0)
        self.loading = time.perf_counter() - start
        self.architecture = model.fusion_options.architecture
        self.trained = model.num_parameters(only_trainable=True)
        self.parameters = model.num_parameters() - self.trained
        self.width = model.config.get_text_config(decoder=True).hidden_size
        tokens = sum(map(len, documents))
        data: Any = [{"input_ids": np.array(ids)} for ids in documents]
        batch = self._batch(data, tokenizer, model)
        with torch.no_grad():
            whole = _timed(lambda: model(**batch))
        self.token = whole / tokens * ALONE
        self.fast: list[str] = []
        with tempfile.TemporaryDirectory() as folder, suppress(ValmError):  # a family whose layers cannot be skipped
            data = cache_below(model, data, folder, progress=False)
            batch = self._batch([data[number] for number in range(len(data))], tokenizer, model)
            self.fast.append("cache_below")
        BaseDivergence(model, BASE_KL)
        with suppress(ValmError):  # a family whose head is no plain matrix
            LimitedSoftmax(model, data)
            self.fast.append("limit_softmax")
        model.train()
        self.step = _timed(lambda: model(**batch).loss.backward())
        model.eval()
        with torch.no_grad():
            self.evaluation = _timed(lambda: model(**batch))
        self.below = (whole - self.evaluation) / tokens if "cache_below" in self.fast else 0.0

    def _batch(self, data: list[Any], tokenizer: PreTrainedTokenizerFast, model: Any) -> dict[str, Any]:
        row_length = CONTEXT if model.finder.tells_apart(model.base_model) else None  # as `trainer` packs
        batch = Collator(tokenizer, None, row_length)(data)
        index = torch.randint(PICTURES, (*batch["input_ids"].shape, IMAGES))
        return batch | {"image_pool": torch.randn(PICTURES, model.fusion_options.image_dim), "image_index": index}


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of `work`, after a call that is not counted: the mean of STEPS calls."""
    work()
    start = time.perf_counter()
    for _ in range(STEPS):
        work()
    return (time.perf_counter() - start) / STEPS


def _small_clip(found: Found) -> tuple[Clip, float]:
    """A small CLIP for the texts, and the seconds of a step of its training."""
    clip = new_clip(SMALL, tokenizer=prune_tokenizer(clip_tokenizer(), found.texts))
    views = CaptionedImages(shrunk(found.captioned[:CLIP_BATCH], clip, workers=0, progress=None), clip, seed=0)
    begun = []

    def batches() -> Iterator[tuple[torch.Tensor, list[str]]]:
        for batch in views.batches(CLIP_BATCH):
            begun.append(time.perf_counter())
            yield batch

    train_clip(clip, batches(), steps=STEPS + 2, lr=1e-3, progress=None)
    return clip, (begun[STEPS + 1] - begun[1]) / STEPS  # the first step takes longer


def _encode(clip: Clip, records: list[Record]) -> None:
    """Decodes and encodes PICTURES pictures."""
    for record in records[:: max(1, len(records) // PICTURES)][:PICTURES]:
        with suppress(ValueError, OSError):  # a damaged picture, which the knowledge base lists
            clip.encode_images([record.read()])
