"""valm lm-eval."""

from __future__ import annotations

import argparse

from valm.cli.options import Commands, command

DESCRIPTION = """lm-evaluation-harness with model "valm" and the tasks of the paper, for example

  valm lm-eval run --model valm --model_args pretrained=FOLDER,kb=FOLDER,retrieval=off --tasks valm_memory_color

retrieval is on, off or random; the data come from --metadata data=FOLDER, from VALM_EVAL_DATA, or from the Hugging
Face Hub where it has them. `valm lm-eval run --help` shows the harness's own options."""


def add_to(commands: Commands) -> None:
    lm_eval = command(commands, "lm-eval", run_lm_eval, "run lm-evaluation-harness on a model")
    lm_eval.description, lm_eval.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    lm_eval.add_argument("command", choices=["run", "ls", "validate"], help="a command of the harness")
    lm_eval.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")


def run_lm_eval(arguments: argparse.Namespace) -> None:
    from valm.evaluation.harness import run

    run([arguments.command, *arguments.arguments])
