"""Trains a CLIP by a `ClipPlan`: what `valm clip train` does."""

from __future__ import annotations

import logging
import random
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from valm.clip.clip import Clip
from valm.clip.device import open_device
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.corpus.texts import TextCorpus, fingerprint
from valm.errors import ValmError
from valm.evaluation.clip_check import Retrieval, note_held_out, retrieve
from valm.knowledge_base.encode import decoding_workers, encode_records
from valm.knowledge_base.records import Encoding, Record, fingerprint_records, written_since
from valm.store.files import output_folder
from valm.store.shards import ProgressBar
from valm.training.clip import CachedImages, CaptionedImages, captioned, new_clip, shrunk, train_clip
from valm.training.clip_plan import LEAST_HELD_OUT, SMALL_HELD_OUT, ClipPlan
from valm.training.steps_checkpoint import StepsCheckpoint
from valm_kernels.atomic_files import remove_leftovers

log = logging.getLogger(__name__)

# Captions that are tokenized at once.
CUT_BATCH = 4096
# How many images, trained on or held out, are looked at in the end.
MOST_CHECKED = 500
# In the output folder until the training is finished.
TRAINING_FILE = "training.checkpoint"
# The options that decide the result, beside the model and the data.
SETTINGS = ("cache_images", "steps", "batch_size", "lr", "max_logit_scale", "held_out", "seed")


class ClipTraining(NamedTuple):
    """A training that is finished.

    Attributes:
        losses: of every step.
        images: how many were trained on.
        trained_on, held_out: how captions and images find each other, of each kind (MOST_CHECKED of them); None of
            fewer than two.
    """

    clip: Clip
    losses: list[float]
    images: int
    trained_on: Retrieval | None
    held_out: Retrieval | None


def run_clip_plan(plan: ClipPlan) -> ClipTraining:
    """Trains the CLIP of `plan`, from where a killed training of it was, and writes it to its folder with the list of
    the images that were held out.

    Raises:
        OSError: the folder cannot be written.
        ValmError: fields do not go together, the folder holds something else, or there is no such model; the images are
            too few; as `train_clip`.
    """
    plan = plan.checked()
    with output_folder(plan.out) as out:
        return _train(plan, out)


def _train(plan: ClipPlan, out: Path) -> ClipTraining:
    assert plan.steps is not None and plan.max_logit_scale is not None  # as `checked` has it
    file = out / TRAINING_FILE
    check_output(out)
    records = captioned(plan.images)
    data = fingerprint_records(records)
    device = open_device(plan.device)
    tower = None if plan.image_tower is None else Clip.load(plan.image_tower)
    torch.manual_seed(plan.seed)
    tokenizer = _small_tokenizer(plan, records) if plan.small else None
    clip = new_clip(plan.model, tower, tokenizer).to(device)
    settings: dict[str, Any] = {"images and captions": data}
    settings["--vocabulary"] = None if tokenizer is None else fingerprint(sorted(tokenizer.get_vocab()))
    settings |= {f"--{name.replace('_', '-')}": getattr(plan, name) for name in SETTINGS}
    settings |= {"--model": clip.model_cfg, "image transform": clip.preprocess_cfg()}
    settings["--image-tower"] = None if tower is None else tower.weights_hash
    checkpoint = StepsCheckpoint(file, clip.model, settings)
    if done := len(checkpoint.losses):
        log.warning(f"{out} has the first {done:,} of {plan.steps:,} steps: resuming there")
        if changed := written_since(plan.images.files(), file.stat().st_mtime):  # no error: a copy has new times too
            warnings.warn(
                f"{changed} has been written since then: if its content is another, begin the training anew in another "
                "folder",
                stacklevel=4,
            )
    else:
        _say_what_is_cut(clip, records)
    held_out, records = _split(records, plan)
    workers = 0
    if not plan.cache_images:
        views = shrunk(records, clip)
        if views is records or device.type != "cpu":  # on a CPU the steps themselves take all cores
            workers = decoding_workers(len(records))
        records = views
    images = (CachedImages if plan.cache_images else CaptionedImages)(records, clip, plan.seed)
    with images.cached() if isinstance(images, CachedImages) else nullcontext():
        losses = train_clip(
            clip,
            images.batches(plan.batch_size, skip=done, workers=workers),
            steps=plan.steps,
            lr=plan.lr,
            max_logit_scale=plan.max_logit_scale,
            checkpoint=checkpoint,
        )
    clip.name = out.resolve().name
    clip.save(out)
    note_held_out(out, clip, held_out)
    file.unlink(missing_ok=True)
    recalls = (_recall("trained on", records, clip), _recall("held out", held_out, clip))
    return ClipTraining(clip, losses, len(records), *recalls)


def check_output(out: Path) -> None:
    """Checks that a training may write to the folder `out`, and removes what a killed writer left there.

    Raises:
        ValmError: it holds something else than an unfinished training.
    """
    remove_leftovers(out)
    found = [file.name for file in out.iterdir()]
    if found and TRAINING_FILE not in found:
        raise ValmError(f"the output folder {out} is not empty (it has {found[0]}); choose another")


def _small_tokenizer(plan: ClipPlan, records: list[Record]) -> PreTrainedTokenizerFast:
    """CLIP's tokenizer, pruned to the captions and the vocabulary: most of its 49,408 tokens would never be trained."""
    more = [] if plan.vocabulary is None else TextCorpus([plan.vocabulary]).documents()
    return prune_tokenizer(clip_tokenizer(), [*(record.caption for record in records), *more])


def _say_what_is_cut(clip: Clip, records: list[Record]) -> None:
    """Says how many captions are longer than the text tower's context."""
    captions = [caption for record in records for caption in record.caption.split("\n")]
    most = clip.context_length - 2
    long = [caption for caption in captions if len(caption) > most]  # a token has a character at least
    cut = 0
    for begin in range(0, len(long), CUT_BATCH):
        tokens = clip.tokenizer(long[begin : begin + CUT_BATCH], add_special_tokens=False)["input_ids"]
        cut += sum(len(ids) > most for ids in tokens)
    if cut:
        log.warning(f"{cut:,} of {len(captions):,} captions have more than {most} tokens: they are cut there")


def _split(records: list[Record], plan: ClipPlan) -> tuple[list[Record], list[Record]]:
    """The images that are held out, and the others.

    Raises:
        ValmError: fewer than two are left to train on, or one alone is held out, which has no other to be found before.
    """
    share = plan.held_out
    if share is None:
        enough = plan.small and len(records) >= 10 * LEAST_HELD_OUT
        share = min(SMALL_HELD_OUT, MOST_CHECKED / len(records)) if enough else 0.0
    count = round(share * len(records))
    if count == 1 or (count == 0 and share > 0) or len(records) - count < 2:
        raise ValmError(f"--held-out {share:g} of {len(records):,} images is {count}: hold out and keep two or more")
    order = list(records)
    random.Random(plan.seed).shuffle(order)
    return order[:count], order[count:] if count else records


def _recall(which: str, records: list[Record], clip: Clip) -> Retrieval | None:
    """How captions and images find each other among MOST_CHECKED of `records`; None of fewer than two."""
    records = records[:MOST_CHECKED]
    if len(records) < 2:
        return None
    with ProgressBar(which, " images", 1, True) as bar:
        shard = encode_records(records, clip, Encoding(thumbnails=0, workers=0), bar)
    captions = [text.splitlines() for text in shard.items["caption"].to_pylist()]
    return retrieve(torch.from_numpy(shard.vectors), captions, clip)
