"""valm eval."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from valm.cli.options import Commands, add_json, command, print_json
from valm.errors import ValmError
from valm.evaluation.settings import Settings
from valm.options import add_fields, given_fields

EXAMPLE = "valm eval model base --tasks color --data sets --out report"


def add_to(commands: Commands) -> None:
    help = "evaluate models, in the layout of the paper's tables"
    evaluate = command(commands, "eval", run_eval, help, EXAMPLE)
    evaluate.add_argument(
        "model",
        nargs="+",
        help="checkpoint, augmented decoder, causal or masked language model, or CLIP: FOLDER, NAME=FOLDER, or "
        "NAME=FOLDER,FOLDER for checkpoints that differ in their seed",
    )
    add_fields(evaluate, Settings)
    evaluate.add_argument(
        "--out",
        type=Path,
        help="folder to write results.json, results.md, report.html and cached scores to; the same command resumes a "
        "killed run and moves an earlier report into a subfolder",
    )
    add_json(evaluate)


def run_eval(arguments: argparse.Namespace) -> None:
    from valm.evaluation.report import markdown, write_report
    from valm.evaluation.suite import evaluate, named
    from valm.store.files import writable_folder

    if arguments.out is not None:
        if arguments.out.is_file():
            raise ValmError(f"the output {arguments.out} is a file; choose a folder")
        writable_folder(arguments.out)
    settings = Settings(**given_fields(Settings, arguments))
    results = evaluate(named(arguments.model), settings, arguments.out)
    report, earlier = (None, None) if arguments.out is None else write_report(results, arguments.out)
    if earlier is not None:
        print(f"the report that was in {arguments.out} is now in {earlier}", file=sys.stderr)
    if arguments.json:
        print_json(results)
        return
    print(markdown(results))
    if report is not None:
        print(f"written to {report}")
