"""valm clip check."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from valm.cli.kb import open_images
from valm.cli.options import Commands, add_device, chosen_device, command

EXAMPLE = "valm clip check pictures --clip clip"


def add_to(commands: Commands) -> None:
    check = command(commands, "check", run_check, "evaluate a CLIP on labelled or captioned images", EXAMPLE)
    help = "folder or zip file of images, in class folders, with captions, or both"
    check.add_argument("source", metavar="folder", type=Path, help=help)
    check.add_argument(
        "--clip", required=True, help="folder of the CLIP, hf-hub:ORGANISATION/MODEL or ARCHITECTURE:WEIGHTS"
    )
    check.add_argument("--captions", type=Path, help="table of captions, if the folder does not contain it")
    add_device(check)
    check.add_argument("--out", type=Path, help="JSON file to write all numbers to")


def run_check(arguments: argparse.Namespace) -> None:
    from valm.store.files import output_file, write_json

    source = open_images(arguments)

    from valm.clip.clip import Clip
    from valm.evaluation.clip_check import MIN_PER_CLASS, check_clip

    result = check_clip(source, Clip.load(arguments.clip, device=chosen_device(arguments)))
    print(f"the CLIP {result.clip}; 95 % confidence intervals over images")
    if result.held_out:
        print(f"evaluated on the {result.held_out:,} images that its training held out, of {result.images:,}")
    elif result.listed:
        print(
            f"at most half of the {result.listed:,} images that its training held out are here: evaluated on all "
            f"{result.images:,} images, which may include images of its training"
        )
    found = result.classification
    if found is not None:
        print(f"{found.pictures:,} images of {len(found.classes)} classes, chance {found.chance:.3f}")
        print(f"  zero-shot     {found.zero_shot}  majority class {found.majority:.3f}")
        print(f"  balanced      {found.balanced:.3f}")
        probe = found.linear_probe
        if probe is None:
            print(f"  linear probe  skipped: a class contains fewer than {MIN_PER_CLASS} images")
        else:
            print(
                f"  linear probe  {probe.accuracy}  majority class {probe.majority:.3f}; trained on "
                f"{probe.trained_on:,}, tested on {probe.tested_on:,}"
            )
    if result.retrieval is not None:
        print(f"{result.retrieval.pictures:,} images with {result.retrieval.captions:,} captions")
        for name, recalls in (
            ("image to text", result.retrieval.image_to_text),
            ("text to image", result.retrieval.text_to_image),
        ):
            for recall in recalls:
                print(f"  {name}  recall@{recall.at:<2}  {recall.recall}  chance {recall.chance:.4f}")
    if result.skipped:
        print(f"{len(result.skipped):,} images or captions could not be read; the first: {result.skipped[0]['uri']}")
    if arguments.out:
        with output_file(arguments.out) as temporary:
            write_json(temporary, asdict(result))
