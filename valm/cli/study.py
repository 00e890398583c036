"""valm study run, report."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from valm.cli.options import Commands, command


def add_to(commands: Commands) -> None:
    study = commands.add_parser("study", help="do pictures help a language model: the study of docs/study-plan.md")
    study_commands = study.add_subparsers(required=True, metavar="COMMAND")
    run = command(study_commands, "run", run_run, "run all stages of a study that are not finished")
    run.add_argument("config", type=Path, help="YAML file, such as studies/small.yaml")
    run.add_argument("--out", type=Path, required=True, help="folder of everything; a killed study resumes in it")
    run.add_argument("--data", type=Path, help="folder of the evaluation sets (default: $VALM_EVAL_DATA)")
    run.add_argument(
        "--validation", action="store_true", help="ask validation things and held-out text alone, and no test set"
    )
    run.add_argument("--seed", type=int, action="append", help="run this one of its seeds only; may be repeated")
    run.add_argument("--results", type=Path, help="folder into which the results of each seed are copied")
    pictures = command(study_commands, "pictures", run_pictures, "draw what VaLM of a finished seed sees and answers")
    pictures.add_argument("config", type=Path, help="YAML file of the study")
    pictures.add_argument("--out", type=Path, required=True, help="its folder")
    pictures.add_argument("--data", type=Path, help="folder of the evaluation sets (default: $VALM_EVAL_DATA)")
    pictures.add_argument("--seed", type=int, help="which of its seeds (default: the first)")
    pictures.add_argument("--figures", type=Path, default=Path("docs/images"), help="folder of the figures")
    report = command(study_commands, "report", run_report, "write the tables and figures of a page from results")
    report.add_argument("results", type=Path, nargs="+", help="results of the seeds of one study")
    report.add_argument("--page", type=Path, default=Path("docs/study.md"), help="Markdown file with marks for tables")
    report.add_argument("--figures", type=Path, default=Path("docs/images"), help="folder of the figures")


def run_run(arguments: argparse.Namespace) -> None:
    import shutil

    from valm.evaluation.sets import DATA_VARIABLE
    from valm.files import output_file, writable_folder
    from valm.study.config import read_config
    from valm.study.report import accuracies, differences, perplexities
    from valm.study.results import read_results
    from valm.study.run import Study, run_study
    from valm.training.launch import check_alone

    check_alone("study run")
    config = read_config(arguments.config)
    data = arguments.data or os.environ.get(DATA_VARIABLE)
    study = Study(
        config,
        arguments.out,
        arguments.main,
        None if data is None else Path(data),
        validation=arguments.validation,
        progress=not arguments.quiet,
    )
    files = run_study(study, arguments.seed)
    for seed, file in files.items():
        print(f"seed {seed}: {file}")
        if arguments.results is not None:
            kind = "validation-" if arguments.validation else ""
            with output_file(writable_folder(arguments.results) / f"{kind}{config.name}-seed-{seed}.json") as copy:
                shutil.copyfile(file, copy)
    results = read_results(list(files.values()))
    print("\n\n".join((accuracies(results), differences(results), perplexities(results))))


def run_pictures(arguments: argparse.Namespace) -> None:
    from valm.evaluation.sets import DATA_VARIABLE
    from valm.study.config import read_config
    from valm.study.exhibits import write_exhibits
    from valm.study.run import Study

    config = read_config(arguments.config)
    data = arguments.data or os.environ.get(DATA_VARIABLE)
    study = Study(config, arguments.out, arguments.main, None if data is None else Path(data))
    write_exhibits(study, config.seeds[0] if arguments.seed is None else arguments.seed, arguments.figures)
    print(f"written to {arguments.figures}")


def run_report(arguments: argparse.Namespace) -> None:
    from valm.study.report import write_page
    from valm.study.results import read_results

    write_page(read_results(arguments.results), arguments.page, arguments.figures)
    print(f"written to {arguments.page} and {arguments.figures}")
