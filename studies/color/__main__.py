"""python -m studies.color run, report: do pictures help a language model (studies/color/plan.md)?"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from valm.cli import main as valm
from valm.cli import run_command
from valm.cli.options import CommandParser, command, program


def build_parser() -> CommandParser:
    study = program("python -m studies.color", "Do pictures help a language model?")
    study_commands = study.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    run = command(study_commands, "run", run_run, "run all stages of a study that are not finished")
    run.add_argument("config", type=Path, help="YAML file, such as studies/color/small.yaml")
    run.add_argument("--out", type=Path, required=True, help="output folder; a killed study resumes in it")
    run.add_argument("--data", type=Path, help="folder of the evaluation sets (default: $VALM_EVAL_DATA)")
    run.add_argument(
        "--validation", action="store_true", help="ask only about validation objects and held-out text, and no test set"
    )
    run.add_argument("--seed", type=int, action="append", help="run only this seed of the study; may be repeated")
    run.add_argument("--results", type=Path, help="folder to copy the results of each seed to")
    report = command(study_commands, "report", run_report, "write tables and a figure into pages, from results")
    report.add_argument("results", type=Path, nargs="+", help="results of the seeds of one study")
    report.add_argument(
        "--page",
        type=Path,
        action="append",
        help="Markdown file with marks for tables; may be repeated (default: docs/results/study.md and the archive)",
    )
    report.add_argument("--figures", type=Path, default=Path("docs/images"), help="folder of the figure")
    return study


def run_run(arguments: argparse.Namespace) -> None:
    import shutil

    from studies.color.config import read_config
    from studies.color.report import answers, secondary, state
    from studies.color.results import read_results
    from studies.color.run import run_study
    from studies.color.study import Study
    from valm.store.files import output_file, writable_folder
    from valm.training.launch import check_alone

    check_alone("python -m studies.color run")
    config = read_config(arguments.config)
    study = Study(
        config,
        arguments.out,
        valm,
        _data(arguments),
        validation=arguments.validation,
        progress=not arguments.quiet,
    )
    files = run_study(study, arguments.seed)
    for seed, file in files.items():
        print(f"seed {seed}: {file}")
        if arguments.results is not None:
            with output_file(writable_folder(arguments.results) / results_name(config.name, seed, file)) as copy:
                shutil.copyfile(file, copy)
    results = read_results(list(files.values()))
    print("\n\n".join(table(results) for table in (state, answers, secondary)))


def results_name(study: str, seed: int, file: Path) -> str:
    """The name in a folder of results for what the results file of a seed contains."""
    from studies.color.run import RESULTS_FILE

    return f"{file.name.removesuffix(RESULTS_FILE)}{study}-seed-{seed}.json"


def _data(arguments: argparse.Namespace) -> Path | None:
    """The folder of the evaluation sets."""
    from valm.evaluation.sets import DATA_VARIABLE

    data = arguments.data or os.environ.get(DATA_VARIABLE)
    return None if data is None else Path(data)


def run_report(arguments: argparse.Namespace) -> None:
    from studies.color.report import PAGES, write_figure, write_pages
    from studies.color.results import read_results

    results = read_results(arguments.results)
    pages = write_pages(results, arguments.page or PAGES)
    write_figure(results, arguments.figures)
    print(f"written to {', '.join(map(str, pages))} and {arguments.figures}")


if __name__ == "__main__":
    sys.exit(run_command(build_parser()))
