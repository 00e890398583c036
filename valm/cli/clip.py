"""valm clip train; `valm clip check` is in clip_check.py."""

from __future__ import annotations

import argparse

from valm.cli import clip_check
from valm.cli.kb import add_images, open_images
from valm.cli.options import Commands, command
from valm.options import add_fields, given_fields
from valm.training.clip_plan import ClipPlan
from valm.training.launch import check_alone

EXAMPLE = "valm clip train pictures --model small --out clip"


def add_to(commands: Commands) -> None:
    clip = commands.add_parser("clip", help="train or evaluate a CLIP")
    clip_commands = clip.add_subparsers(required=True, metavar="COMMAND")
    train = command(clip_commands, "train", run_train, "train a CLIP on captioned images", EXAMPLE)
    add_images(train, without="streaming")  # it reads the images once an epoch
    add_fields(train, ClipPlan)
    clip_check.add_to(clip_commands)


def run_train(arguments: argparse.Namespace) -> None:
    check_alone("valm clip train")
    plan = ClipPlan(images=open_images(arguments), **given_fields(ClipPlan, arguments)).checked()

    from valm.training.clip_run import run_clip_plan

    trained = run_clip_plan(plan)
    if trained is None:
        print(f"{plan.out} is complete; nothing to do")
        return
    losses = trained.losses
    print(f"{trained.images:,} images; loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    for which, found in (("trained on", trained.trained_on), ("held out", trained.held_out)):
        if found is not None:
            recall = ", ".join(f"@{r.at} {r.recall.value:.2f} (chance {r.chance:.2f})" for r in found.text_to_image)
            print(f"text to image among {found.pictures:,} images {which}: recall {recall}")
    held_out = "" if trained.held_out is None else ", on the held-out images if PICTURES contains them"
    print(f"written to {plan.out}; `valm clip check PICTURES --clip {plan.out}` evaluates it{held_out}")
