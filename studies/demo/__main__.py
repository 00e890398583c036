"""python -m studies.demo: trains and evaluates a small VaLM and its text-only baseline on real pictures."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from valm.cli import run_command
from valm.cli.options import CommandParser, HelpFormatter, program, seed


def build_parser() -> CommandParser:
    description = "train and evaluate a small VaLM and its text-only baseline on real pictures"
    demo = program("python -m studies.demo", description, formatter_class=HelpFormatter)
    demo.set_defaults(run=_run)
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="folder of results, report and models")
    demo.add_argument("--seed", type=seed, default=0, help="random seed of split, pictures, text, weights and order")
    demo.add_argument(
        "--eval-data",
        type=Path,
        default=os.environ.get("VALM_EVAL_DATA"),
        help="folder of the test sets, for MemoryColor (default: $VALM_EVAL_DATA)",
    )
    return demo


def _run(arguments: argparse.Namespace) -> None:
    from studies.demo.run import run_demo
    from valm.training.launch import check_alone

    check_alone("python -m studies.demo")
    run_demo(arguments.out, seed=arguments.seed, eval_data=arguments.eval_data, progress=not arguments.quiet)


if __name__ == "__main__":
    sys.exit(run_command(build_parser()))
