"""valm explain."""

from __future__ import annotations

import argparse
from pathlib import Path

from valm.cli.options import Commands, add_opening, command, opening
from valm.store.files import name_of
from valm.store.parts import control_of

EXAMPLE = 'valm explain model "the color of the sky is" --out sky.html'


def add_to(commands: Commands) -> None:
    help = "write a page that shows which images and text a model attends to, and what it predicts"
    explain = command(commands, "explain", run_explain, help, EXAMPLE)
    explain.add_argument("model", type=Path, help="folder of the checkpoint, or of `valm pictures`")
    explain.add_argument("prompt", help="text that the model reads")
    explain.add_argument("--out", type=Path, default=Path("explanation.html"), help="HTML file to write")
    explain.add_argument(
        "--answers", metavar="WORDS", help="words to compare, separated by commas, instead of the most likely tokens"
    )
    explain.add_argument(
        "--replace", type=Path, metavar="FOLDER", help="also show the model with images from this folder"
    )
    explain.add_argument("--compare", type=Path, metavar="MODEL2", help="also show another checkpoint")
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
    if compare := arguments.compare or control_of(arguments.model):
        readers[name_of(compare, unlike=readers)] = Reader(*opened.load_other(compare))
    answers = [word.strip() for word in arguments.answers.split(",")] if arguments.answers else None
    explanations = explain_together(readers, arguments.prompt, answers)
    write_page(arguments.out, explanations)
    print(f"page: {arguments.out}")
