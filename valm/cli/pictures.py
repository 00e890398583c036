"""valm pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from valm.cli.options import Commands, command
from valm.options import add_fields, given_fields
from valm.pictures.plan import PicturesPlan
from valm.training.launch import check_alone

EXAMPLE = "valm pictures pictures --model smollm2 --out out"
DESCRIPTION = (
    "make a language model that sees your pictures, a control with random pictures and a report, in one command; the "
    "report names the command of each step"
)


def add_to(commands: Commands) -> None:
    help = "make a model that sees your pictures, and a report, in one command"
    pictures = command(commands, "pictures", run, help, EXAMPLE, description=DESCRIPTION)
    pictures.add_argument(
        "pictures",
        type=Path,
        help="folder or zip file of pictures, a tar file or a folder of tar files, or a table of pictures and captions",
    )
    add_fields(pictures, PicturesPlan)


def run(arguments: argparse.Namespace) -> None:
    check_alone("valm pictures")
    plan = PicturesPlan(**given_fields(PicturesPlan, arguments))
    plan.check()
    source = plan.images().open()  # before imports that take seconds

    from valm.pictures.run import run_pictures

    run_pictures(plan, source)
