"""valm lm-eval."""

from __future__ import annotations

import argparse

from valm.cli.options import Commands

DESCRIPTION = """lm-evaluation-harness with model "valm" and the tasks of the paper, for example

  valm lm-eval run --model valm --model_args pretrained=FOLDER,kb=FOLDER,retrieval=off --tasks valm_memory_color

retrieval is on, off or random; the data come from --metadata data=FOLDER, from VALM_EVAL_DATA, or from the Hugging
Face Hub where it has them. `valm lm-eval run --help` shows the harness's own options."""


def add_to(commands: Commands) -> None:
    lm_eval = commands.add_parser(
        "lm-eval",
        help="run lm-evaluation-harness on a model",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lm_eval.add_argument("command", choices=["run", "ls", "validate"], help="a command of the harness")
    lm_eval.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    lm_eval.set_defaults(run=run_lm_eval)


def run_lm_eval(arguments: argparse.Namespace) -> None:
    from valm.evaluation.harness import run

    run([arguments.command, *arguments.arguments])
