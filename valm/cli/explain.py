"""valm explain."""

from __future__ import annotations

import argparse
from pathlib import Path

from valm.cli.options import Commands, add_opening, command, opening
from valm.store.files import name_of


def add_to(commands: Commands) -> None:
    explain = command(commands, "explain", run_explain, "show what a model looks at while it reads, and its answers")
    explain.add_argument("model", type=Path, help="checkpoint folder")
    explain.add_argument("prompt", help="the text that is read")
    explain.add_argument("--out", type=Path, default=Path("explanation.html"), help="the page")
    explain.add_argument("--answers", help="words to compare, with commas between them, instead of the likeliest")
    explain.add_argument("--replace", type=Path, metavar="FOLDER", help="beside it, with images out of this folder")
    explain.add_argument("--compare", type=Path, metavar="MODEL2", help="beside it, another checkpoint")
    add_opening(explain)


def run_explain(arguments: argparse.Namespace) -> None:
    from valm.evaluation.controls import images_for
    from valm.explain.explanation import Reader, explain_together
    from valm.explain.page import write_page

    opened = opening(arguments)
    model, tokenizer = opened.load(arguments.model)
    name = name_of(arguments.model)
    readers = {name: Reader(model, tokenizer)}
    if arguments.replace:
        replaced = images_for(model, replace=arguments.replace)
        readers[f"{name}, with images of {arguments.replace.absolute().name}"] = Reader(model, tokenizer, replaced)
    if arguments.compare:
        readers[name_of(arguments.compare, unlike=readers)] = Reader(*opened.load_other(arguments.compare))
    answers = [word.strip() for word in arguments.answers.split(",")] if arguments.answers else None
    explanations = explain_together(readers, arguments.prompt, answers)
    write_page(arguments.out, explanations)
    print(f"page: {arguments.out}")
