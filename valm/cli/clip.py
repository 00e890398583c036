"""valm clip train."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from valm.cli.kb import add_source, open_source
from valm.cli.options import Commands, add_device, chosen_device, command, not_negative, positive, seed
from valm.errors import ValmError


def portion(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def add_to(commands: Commands) -> None:
    clip = commands.add_parser("clip", help="train a CLIP")
    clip_commands = clip.add_subparsers(required=True, metavar="COMMAND")
    train = command(clip_commands, "train", run_train, "train a CLIP on captioned images")
    add_source(train)
    train.add_argument(
        "--model",
        help="architecture of open_clip's, or a JSON file with its model_cfg (default: that of --image-tower)",
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
    train.add_argument("--steps", type=positive, default=1000, help="updates")
    train.add_argument("--batch-size", type=positive, default=128, help="images a step, each with one caption")
    train.add_argument("--lr", type=above_zero, default=1e-3, help="learning rate at its highest")
    train.add_argument(
        "--prefixes", type=portion, default=0.5, help="share of the captions that are cut behind a random word"
    )
    train.add_argument(
        "--max-logit-scale", type=above_zero, default=100.0, help="lower where few images are overfitted, as 50"
    )
    train.add_argument("--workers", type=not_negative, default=0, help="processes that decode images")
    train.add_argument("--seed", type=seed, default=0, help="of weights, order, views and cut captions")
    add_device(train)


def run_train(arguments: argparse.Namespace) -> None:
    from valm.store.files import output_folder
    from valm.training.launch import check_alone

    check_alone("valm clip train")
    if arguments.model is None and arguments.image_tower is None:
        raise ValmError("give --model, --image-tower, or both")
    if arguments.cache_images and arguments.image_tower is None:
        raise ValmError("--cache-images is for a frozen image tower: give --image-tower, or train without it")
    with output_folder(arguments.out) as out:
        train(arguments, out)


def train(arguments: argparse.Namespace, out: Path) -> None:
    import torch

    from valm.clip.clip import Clip
    from valm.training.clip import CachedImages, CaptionedImages, captioned, new_clip, train_clip
    from valm_kernels.atomic_files import remove_leftovers

    remove_leftovers(out)
    if any(out.iterdir()):
        raise ValmError(f"the output folder {out} is not empty; choose another")
    records = captioned(open_source(arguments))
    device = chosen_device(arguments)
    tower = Clip.load(arguments.image_tower) if arguments.image_tower is not None else None
    torch.manual_seed(arguments.seed)
    clip = new_clip(arguments.model, tower).to(device)
    images = (CachedImages if arguments.cache_images else CaptionedImages)(
        records, clip, arguments.seed, arguments.prefixes
    )
    with images.cached() if isinstance(images, CachedImages) else nullcontext():
        losses = train_clip(
            clip,
            images.batches(arguments.batch_size, workers=arguments.workers),
            steps=arguments.steps,
            lr=arguments.lr,
            max_logit_scale=arguments.max_logit_scale,
        )
    clip.name = out.resolve().name
    clip.save(out)
    print(
        f"{len(records):,} images; loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; written to "
        f"{out}; `valm encoder check PICTURES --clip {out}` says what it sees"
    )
