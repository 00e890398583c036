"""valm demo."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from valm.cli.options import Commands, command, seed


def add_to(commands: Commands) -> None:
    demo = command(
        commands, "demo", run_demo, "train and evaluate a small VaLM and its text-only twin on real pictures"
    )
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="folder of results, report and models")
    demo.add_argument("--seed", type=seed, default=0, help="of everything that is drawn")
    demo.add_argument(
        "--eval-data",
        type=Path,
        default=os.environ.get("VALM_EVAL_DATA"),
        help="folder of the evaluation sets, for MemoryColor (default: the variable VALM_EVAL_DATA)",
    )


def run_demo(arguments: argparse.Namespace) -> None:
    from valm.demo.run import run_demo
    from valm.training.launch import check_alone

    check_alone("demo")
    run_demo(arguments.out, seed=arguments.seed, eval_data=arguments.eval_data)
