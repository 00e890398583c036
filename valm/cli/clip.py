"""valm clip train; `valm clip check` is in clip_check.py."""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valm.cli import clip_check
from valm.cli.kb import add_source, open_source
from valm.cli.options import Commands, above_zero, add_device, chosen_device, command, not_negative, positive, seed
from valm.errors import ValmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from valm.clip.clip import Clip
    from valm.knowledge_base.encode import Record

STEPS, SMALL_STEPS = 1000, 300
# Share of the images that small holds out, if that makes so many; and how many at most, of both parts, are looked at.
SMALL_HELD_OUT, LEAST_HELD_OUT, MOST_CHECKED = 0.1, 10, 500
# Captions that are tokenized at once.
CUT_BATCH = 4096
# In the output folder until the training is finished.
TRAINING_FILE = "training.checkpoint"
# The options that decide the result, beside the model and the data.
SETTINGS = ("cache_images", "steps", "batch_size", "lr", "prefixes", "max_logit_scale", "held_out", "seed")


def portion(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def add_to(commands: Commands) -> None:
    clip = commands.add_parser("clip", help="train a CLIP, or see what one sees")
    clip_commands = clip.add_subparsers(required=True, metavar="COMMAND")
    clip_check.add_to(clip_commands)
    train = command(clip_commands, "train", run_train, "train a CLIP on captioned images")
    add_source(train)
    train.add_argument(
        "--model",
        help="small, which trains from scratch on hundreds of images in minutes; an architecture of open_clip's; or a "
        "JSON file with its model_cfg (default: that of --image-tower)",
    )
    train.add_argument(
        "--image-tower",
        help="CLIP whose image side is taken over and frozen (LiT): folder, hf-hub:ORGANISATION/MODEL or "
        "ARCHITECTURE:WEIGHTS",
    )
    train.add_argument(
        "--cache-images",
        action="store_true",
        help="run the frozen --image-tower once over every image, without random views, and train on what it returns",
    )
    train.add_argument("--out", type=Path, required=True, help="folder of the CLIP, in open_clip's format")
    train.add_argument(
        "--resume", action="store_true", help="continue the unfinished training in --out, if there is one"
    )
    train.add_argument("--steps", type=positive, help=f"updates (default: {STEPS}; small: {SMALL_STEPS})")
    train.add_argument("--batch-size", type=positive, default=128, help="images a step, each with one caption")
    train.add_argument("--lr", type=above_zero, default=1e-3, help="learning rate at its highest")
    train.add_argument(
        "--prefixes", type=portion, default=0.5, help="share of the captions that are cut after a random word"
    )
    train.add_argument(
        "--max-logit-scale",
        type=above_zero,
        help="limit of the learned temperature: lower where few images are overfitted (default: 100; small: 50)",
    )
    train.add_argument(
        "--held-out",
        type=portion,
        metavar="SHARE",
        help="share of the images that is not trained on, for the recall printed at the end (default: 0; small: "
        f"{SMALL_HELD_OUT} from {10 * LEAST_HELD_OUT} images on)",
    )
    train.add_argument(
        "--vocabulary",
        type=Path,
        metavar="CORPUS",
        help="with --model small: text whose words become tokens too, beside those of the captions",
    )
    train.add_argument(
        "--workers", type=not_negative, help="processes that decode images (default: by their number and the cores)"
    )
    train.add_argument("--seed", type=seed, default=0, help="of weights, order, views, cut captions and --held-out")
    add_device(train)


def run_train(arguments: argparse.Namespace) -> None:
    from valm.store.files import output_folder
    from valm.training.clip import MAX_LOGIT_SCALE, SMALL, SMALL_MAX_LOGIT_SCALE
    from valm.training.launch import check_alone

    check_alone("valm clip train")
    if arguments.model is None and arguments.image_tower is None:
        raise ValmError("give --model, --image-tower, or both")
    if arguments.cache_images and arguments.image_tower is None:
        raise ValmError("--cache-images is for a frozen image tower: give --image-tower, or train without it")
    small = arguments.model == SMALL
    if arguments.vocabulary is not None and not small:
        raise ValmError("--vocabulary is for --model small: others read with all of CLIP's tokens")
    if arguments.steps is None:
        arguments.steps = SMALL_STEPS if small else STEPS
    if arguments.max_logit_scale is None:
        arguments.max_logit_scale = SMALL_MAX_LOGIT_SCALE if small else MAX_LOGIT_SCALE
    with output_folder(arguments.out) as out:
        train(arguments, out)


def say_what_is_cut(clip: Clip, records: list[Record]) -> None:
    """Says how many captions are longer than the text tower's context."""
    captions = [caption for record in records for caption in record.caption.split("\n")]
    most = clip.context_length - 2
    long = [caption for caption in captions if len(caption) > most]  # a token has a character at least
    cut = 0
    for begin in range(0, len(long), CUT_BATCH):
        tokens = clip.tokenizer(long[begin : begin + CUT_BATCH], add_special_tokens=False)["input_ids"]
        cut += sum(len(ids) > most for ids in tokens)
    if cut:
        print(
            f"{cut:,} of {len(captions):,} captions have more than {most} tokens: they are cut there", file=sys.stderr
        )


def train(arguments: argparse.Namespace, out: Path) -> None:
    import torch

    from valm.clip.clip import Clip
    from valm.corpus.texts import fingerprint
    from valm.knowledge_base.sources import fingerprint_records, written_since
    from valm.training.clip import SMALL, CachedImages, CaptionedImages, captioned, new_clip, shrunk, train_clip
    from valm.training.steps_checkpoint import StepsCheckpoint

    file = out / TRAINING_FILE
    check_output(out, arguments.resume)
    source = open_source(arguments)
    records = captioned(source)
    data = fingerprint_records(records)
    device = chosen_device(arguments)
    tower = Clip.load(arguments.image_tower) if arguments.image_tower is not None else None
    torch.manual_seed(arguments.seed)
    tokenizer = small_tokenizer(arguments, records) if arguments.model == SMALL else None
    clip = new_clip(arguments.model, tower, tokenizer).to(device)
    settings: dict[str, Any] = {"images and captions": data}
    settings["--vocabulary"] = None if tokenizer is None else fingerprint(sorted(tokenizer.get_vocab()))
    settings |= {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in SETTINGS}
    settings |= {"--model": clip.model_cfg, "image transform": clip.preprocess_cfg()}
    settings["--image-tower"] = None if tower is None else tower.weights_hash
    checkpoint = StepsCheckpoint(file, clip.model, settings)
    if done := len(checkpoint.losses):
        print(f"{out} has the first {done:,} of {arguments.steps:,} steps: resuming there", file=sys.stderr)
        if changed := written_since(source.files(), file.stat().st_mtime):  # no error: a copy has new times too
            warnings.warn(
                f"{changed} has been written since then: if its content is another, begin the training anew in another "
                "folder",
                stacklevel=2,
            )
    else:
        say_what_is_cut(clip, records)
    held_out, records = split(records, arguments)
    if not arguments.cache_images:
        records = shrunk(records, clip, workers=arguments.workers)
    images = (CachedImages if arguments.cache_images else CaptionedImages)(
        records, clip, arguments.seed, arguments.prefixes
    )
    with images.cached() if isinstance(images, CachedImages) else nullcontext():
        losses = train_clip(
            clip,
            images.batches(arguments.batch_size, skip=done, workers=arguments.workers or 0),
            steps=arguments.steps,
            lr=arguments.lr,
            max_logit_scale=arguments.max_logit_scale,
            checkpoint=checkpoint,
        )
    clip.name = out.resolve().name
    clip.save(out)
    file.unlink(missing_ok=True)
    print(f"{len(records):,} images; loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    print_recall("trained on", records, clip)
    print_recall("held out", held_out, clip)
    print(f"written to {out}; `valm clip check PICTURES --clip {out}` says what it sees")


def check_output(out: Path, resume: bool) -> None:
    """Checks that a training may write to the folder `out`, and removes what a killed writer left there.

    Raises:
        ValmError: it holds something else than a training that is to be resumed.
    """
    from valm_kernels.atomic_files import remove_leftovers

    remove_leftovers(out)
    found = [file.name for file in out.iterdir()]
    if not found or (resume and TRAINING_FILE in found):
        return
    if TRAINING_FILE in found:
        raise ValmError(f"{out} holds an unfinished training: give --resume to continue it, or choose another folder")
    remedy = "it holds no unfinished training; " if resume else ""
    raise ValmError(f"the output folder {out} is not empty (it has {found[0]}); {remedy}choose another")


def small_tokenizer(arguments: argparse.Namespace, records: list[Record]) -> PreTrainedTokenizerFast:
    """CLIP's tokenizer, pruned to the captions and --vocabulary: most of its 49,408 tokens would never be trained."""
    from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
    from valm.corpus.texts import TextCorpus

    more = [] if arguments.vocabulary is None else TextCorpus([arguments.vocabulary]).documents()
    return prune_tokenizer(clip_tokenizer(), [*(record.caption for record in records), *more])


def split(records: list[Record], arguments: argparse.Namespace) -> tuple[list[Record], list[Record]]:
    """The images that --held-out keeps from the training, and the others.

    Raises:
        ValmError: fewer than two are left to train on, or one alone is held out, which has no other to be found before.
    """
    from valm.training.clip import SMALL

    share = arguments.held_out
    if share is None:
        enough = arguments.model == SMALL and len(records) >= 10 * LEAST_HELD_OUT
        share = min(SMALL_HELD_OUT, MOST_CHECKED / len(records)) if enough else 0.0
    count = round(share * len(records))
    if count == 1 or (count == 0 and share > 0) or len(records) - count < 2:
        raise ValmError(f"--held-out {share:g} of {len(records):,} images is {count}: hold out and keep two or more")
    order = list(records)
    random.Random(arguments.seed).shuffle(order)
    return order[:count], order[count:] if count else records


def print_recall(which: str, records: list[Record], clip: Clip) -> None:
    """Prints how often a caption finds its own image among `records`, or among MOST_CHECKED of them."""
    import torch

    from valm.evaluation.clip_check import retrieve
    from valm.knowledge_base.encode import Encoding, encode_records
    from valm.store.shards import ProgressBar

    records = records[:MOST_CHECKED]
    if len(records) < 2:
        return
    with ProgressBar(which, " images", 1, True) as bar:
        shard = encode_records(records, clip, Encoding(thumbnails=0, workers=0), bar)
    captions = [text.splitlines() for text in shard.items["caption"].to_pylist()]
    found = retrieve(torch.from_numpy(shard.vectors), captions, clip).text_to_image
    recall = ", ".join(f"@{r.at} {r.recall.value:.2f} (chance {r.chance:.2f})" for r in found)
    print(f"text to image among {len(captions):,} images {which}: recall {recall}")
