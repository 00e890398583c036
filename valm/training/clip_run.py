"""Trains a CLIP as a `ClipPlan` describes, for `valm clip train`."""

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
from valm.evaluation.clip_check import HELD_OUT_FILE, Retrieval, note_held_out, retrieve
from valm.knowledge_base.encode import decoding_workers, encode_records
from valm.knowledge_base.records import Encoding, Record, fingerprint_records, written_since
from valm.knowledge_base.sources import Source
from valm.store.files import WAIT_SECONDS, read_json, writable_folder, write_json
from valm.store.folders import remove_folder
from valm.store.settings import check_same
from valm.store.shards import ProgressBar
from valm.training.clip import CachedImages, CaptionedImages, captioned, new_clip, shrunk, train_clip
from valm.training.clip_plan import LEAST_HELD_OUT, SMALL_HELD_OUT, ClipPlan
from valm.training.image_trainer import newest_checkpoint, step_of
from valm_kernels.atomic_files import folder_lock, remove_leftovers

log = logging.getLogger(__name__)

# The recall at the end uses at most this many images, trained on or held out.
MOST_CHECKED = 500
# In the output folder: the settings that decide the weights, and checkpoints until the training is finished.
SETTINGS_FILE, CHECKPOINTS = "training.json", "training"
# The options that decide the result, besides the model and the data.
SETTINGS = ("cache_images", "steps", "batch_size", "lr", "max_logit_scale", "held_out", "seed")


class ClipTraining(NamedTuple):
    """A finished training.

    Attributes:
        clip: the trained CLIP.
        losses: the loss of every step.
        images: number of images that were trained on.
        trained_on, held_out: retrieval recall between captions and images, of at most 500 images that were trained on
            or held out; None for fewer than two images.
    """

    clip: Clip
    losses: list[float]
    images: int
    trained_on: Retrieval | None
    held_out: Retrieval | None


def run_clip_plan(plan: ClipPlan) -> ClipTraining | None:
    """Trains a CLIP and writes it to `plan.out`, with the list of the held-out images. A killed training resumes.

    Returns:
        The CLIP, its losses and its recall; None if the folder already contains the finished CLIP.

    Raises:
        OSError: the folder cannot be written.
        TimeoutError: another process trains there.
        ValmError: fields contradict each other, the folder contains something else, there is no such model, there are
            too few images, or as in `train_clip`.
        KeyboardInterrupt: Ctrl-C or SIGTERM ended the training, with a checkpoint.

    Example:
        >>> from valm.knowledge_base.sources.folder import FolderSource
        >>> from valm.training.clip_plan import ClipPlan
        >>> from valm.training.clip_run import run_clip_plan
        >>> plan = ClipPlan(images=FolderSource("pictures"), model="small", steps=2, batch_size=3, out="my-clip")
        >>> len(run_clip_plan(plan).losses)
        2
    """
    plan = plan.checked()
    out = writable_folder(plan.out)
    check_output(out)
    records = captioned(plan.images)
    device = open_device(plan.device)
    tower = None if plan.image_tower is None else Clip.load(plan.image_tower)
    torch.manual_seed(plan.seed)
    tokenizer = _small_tokenizer(plan, records) if plan.small else None
    clip = new_clip(plan.model, tower, tokenizer).to(device)
    settings = _settings(plan, records, clip, tower)
    if (out / HELD_OUT_FILE).exists() and not (out / CHECKPOINTS).exists():
        _check_settings(out, settings, plan.images)
        return None
    with folder_lock(writable_folder(out / CHECKPOINTS), WAIT_SECONDS):
        last = newest_checkpoint(out / CHECKPOINTS)
        if last is None:  # a training without a checkpoint may be replaced
            write_json(out / SETTINGS_FILE, settings)
        else:
            _check_settings(out, settings, plan.images)
            log.warning(f"{out} contains the first {step_of(last):,} of {plan.steps:,} steps: resuming there")
        return _train(plan, clip, records, out, 0 if last is None else step_of(last))


def _train(plan: ClipPlan, clip: Clip, records: list[Record], out: Path, done: int) -> ClipTraining:
    """Trains `clip` from step `done` on and writes it."""
    assert plan.steps is not None and plan.max_logit_scale is not None  # `checked` sets them
    held_out, records = _split(records, plan)
    workers = 0
    if not plan.cache_images:
        views = shrunk(records, clip)
        if views is records or clip.device.type != "cpu":  # on a CPU the steps use all cores
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
            folder=out / CHECKPOINTS,
        )
    clip.name = out.resolve().name
    clip.save(out)
    note_held_out(out, clip, held_out)
    remove_folder(out / CHECKPOINTS)
    recalls = (_recall("trained on", records, clip), _recall("held out", held_out, clip))
    return ClipTraining(clip, losses, len(records), *recalls)


def check_output(out: Path) -> None:
    """Checks that a training may write to the folder `out`, and removes what a killed writer left there. Raises
    ValmError if the folder contains something other than a training."""
    remove_leftovers(out)
    found = [file.name for file in out.iterdir()]
    if {*found} - {CHECKPOINTS} and SETTINGS_FILE not in found:
        raise ValmError(f"the output folder {out} is not empty (it contains {found[0]}): choose another folder")


def _settings(plan: ClipPlan, records: list[Record], clip: Clip, tower: Clip | None) -> dict[str, Any]:
    """The settings that decide the weights, as JSON, under the names that error messages use."""
    settings: dict[str, Any] = {"images and captions": fingerprint_records(records)}
    settings["--vocabulary"] = fingerprint(sorted(clip.tokenizer.get_vocab())) if plan.small else None
    settings |= {f"--{name.replace('_', '-')}": getattr(plan, name) for name in SETTINGS}
    settings |= {"--model": clip.model_cfg, "image transform": clip.preprocess_cfg()}
    settings["--image-tower"] = None if tower is None else tower.weights_hash
    return settings


def _check_settings(out: Path, settings: dict[str, Any], images: Source) -> None:
    """Raises ValmError if the settings differ from the settings saved in `out`."""
    file = out / SETTINGS_FILE
    noted = read_json(file, "the settings of a training", dict[str, Any], "choose another folder")
    check_same(f"{out} contains another training", noted, settings, "choose another folder, or repeat its options")
    if changed := written_since(images.files(), file.stat().st_mtime):  # no error: copying also sets new times
        warnings.warn(
            f"{changed} has been written since the training in {out} began: if its content has changed, start the "
            "training again in another folder",
            stacklevel=4,
        )


def _small_tokenizer(plan: ClipPlan, records: list[Record]) -> PreTrainedTokenizerFast:
    """CLIP's tokenizer, pruned to the captions and the vocabulary; most of its 49,408 tokens would never be trained."""
    more = [] if plan.vocabulary is None else TextCorpus([plan.vocabulary]).documents()
    return prune_tokenizer(clip_tokenizer(), [*(record.caption for record in records), *more])


def _split(records: list[Record], plan: ClipPlan) -> tuple[list[Record], list[Record]]:
    """The held-out images and the remaining images. Raises ValmError if fewer than two images remain, or only one image
    is held out, so that its rank means nothing."""
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
    """The retrieval recall between captions and images of MOST_CHECKED `records`; None for fewer than two."""
    records = records[:MOST_CHECKED]
    if len(records) < 2:
        return None
    with ProgressBar(which, " images", 1, True) as bar:
        shard = encode_records(records, clip, Encoding(thumbnails=0, workers=0), bar)
    captions = [row["caption"].splitlines() for row in shard.rows]
    return retrieve(torch.from_numpy(shard.vectors), captions, clip)
