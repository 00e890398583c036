"""valm lm-eval."""

from __future__ import annotations

import argparse

from valm.cli.options import Commands, command

EXAMPLE = "valm lm-eval run --model valm --model_args pretrained=model,kb=kb,retrieval=on --tasks valm_memory_color"
DESCRIPTION = (
    'run lm-evaluation-harness with the model "valm" and the tasks of the paper; retrieval is on, off or random; the '
    "data come from --metadata data=FOLDER, from VALM_EVAL_DATA, or from the Hugging Face Hub if it has them; "
    "`valm lm-eval run --help` prints the options of the harness"
)


def add_to(commands: Commands) -> None:
    help = "run lm-evaluation-harness on a model"
    lm_eval = command(commands, "lm-eval", run_lm_eval, help, EXAMPLE, description=DESCRIPTION)
    lm_eval.add_argument("command", choices=["run", "ls", "validate"], help="command of the harness")
    lm_eval.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of this command")


def run_lm_eval(arguments: argparse.Namespace) -> None:
    from valm.evaluation.harness import run

    run([arguments.command, *arguments.arguments])
