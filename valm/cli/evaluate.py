"""valm eval."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from valm.cli.options import (
    Commands,
    add_json,
    add_retrieval,
    chosen_device,
    chosen_query_dtype,
    command,
    positive,
    print_json,
)
from valm.errors import ValmError


def add_to(commands: Commands) -> None:
    evaluate = command(commands, "eval", run_eval, "evaluate models side by side, in the layout of the paper's tables")
    evaluate.add_argument(
        "model",
        nargs="+",
        help="a checkpoint, an augmented decoder, a causal or masked language model or a CLIP: FOLDER, NAME=FOLDER, or "
        "NAME=FOLDER,FOLDER for checkpoints that differ in their seed",
    )
    evaluate.add_argument("--tasks", default="color", help="tasks or groups: color,shape,size,material,nlu,lm")
    evaluate.add_argument(
        "--protocol",
        choices=["fair", "published", "both"],
        default="both",
        help="prompts and scoring of the paper, fair ones, or both",
    )
    evaluate.add_argument("--data", type=Path, help="folder of the evaluation sets (default: $VALM_EVAL_DATA)")
    evaluate.add_argument("--limit", type=positive, help="so many items of each set only, for a quick look")
    evaluate.add_argument("--no-images", action="store_true", help="also each model with its images off")
    evaluate.add_argument(
        "--random-images", action="store_true", help="also with random images of its knowledge base for those it finds"
    )
    evaluate.add_argument(
        "--replace", type=Path, metavar="FOLDER", help="also with the images in this folder for those it finds"
    )
    evaluate.add_argument(
        "--out",
        type=Path,
        help="folder of results.json, results.md, report.html and the cache; a killed run resumes, and an earlier "
        "report is kept in a folder of its own",
    )
    add_json(evaluate)
    add_retrieval(evaluate)


def run_eval(arguments: argparse.Namespace) -> None:
    from valm.evaluation.questions import FAIR, PUBLISHED, chosen_tasks
    from valm.evaluation.report import markdown, write_report
    from valm.evaluation.suite import Settings, entries, evaluate
    from valm.store.files import writable_folder

    if arguments.out is not None:
        if arguments.out.is_file():
            raise ValmError(f"the output {arguments.out} is a file; choose a folder")
        writable_folder(arguments.out)
    settings = Settings(
        tasks=tuple(chosen_tasks(arguments.tasks)),
        protocols=(PUBLISHED, FAIR) if arguments.protocol == "both" else (arguments.protocol,),
        data=arguments.data,
        limit=arguments.limit,
        kb=arguments.kb,
        clip=arguments.clip,
        allow_download=arguments.allow_download,
        device=chosen_device(arguments),
        query_dtype=chosen_query_dtype(arguments),
        min_score=arguments.min_score,
        no_images=arguments.no_images,
        random_images=arguments.random_images,
        replace=arguments.replace,
    )
    results = evaluate(entries(arguments.model), settings, arguments.out)
    report, earlier = (None, None) if arguments.out is None else write_report(results, arguments.out)
    if earlier is not None:
        print(f"the report that was in {arguments.out} is now in {earlier}", file=sys.stderr)
    if arguments.json:
        print_json(results)
        return
    print(markdown(results))
    if report is not None:
        print(f"written to {report}")
