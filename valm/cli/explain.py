"""valm explain."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from valm.cli.options import Commands, add_retrieval, chosen_device, command, load_model
from valm.errors import ValmError


def add_to(commands: Commands) -> None:
    explain = command(commands, "explain", run_explain, "show what a model looks at while it reads, and its answers")
    explain.add_argument("model", type=Path, help="checkpoint folder")
    explain.add_argument("prompt", help="the text that is read")
    explain.add_argument("--out", type=Path, default=Path("explanation.html"), help="the page")
    explain.add_argument("--png", type=Path, help="write the same as a picture too")
    explain.add_argument("--answers", help="words to compare, with commas between them, instead of the likeliest")
    explain.add_argument("--replace", type=Path, metavar="FOLDER", help="beside it, with images out of this folder")
    explain.add_argument("--compare", type=Path, metavar="MODEL2", help="beside it, another checkpoint")
    add_retrieval(explain)


def run_explain(arguments: argparse.Namespace) -> None:
    from valm.checkpoint import load
    from valm.explain.explanation import Reader, explain_together
    from valm.explain.figures import check_can_draw, write_figure
    from valm.explain.images import FolderImages
    from valm.explain.page import write_page
    from valm.retrieval.retriever import Retriever

    if arguments.png:
        check_can_draw()
    model, tokenizer = load_model(arguments)
    name = _unlike((), arguments.model)
    readers = {name: Reader(model, tokenizer)}
    if arguments.replace:
        if not isinstance(model.retriever, Retriever):
            raise ValmError(f"--replace: the model in {arguments.model} retrieves no images that could be replaced")
        replaced = FolderImages(arguments.replace, model.retriever)
        readers[f"{name}, with images of {arguments.replace.absolute().name}"] = Reader(model, tokenizer, replaced)
    if arguments.compare:
        other = load(arguments.compare, device=chosen_device(arguments))
        readers[_unlike(readers, arguments.compare)] = Reader(*other)
    answers = [word.strip() for word in arguments.answers.split(",")] if arguments.answers else None
    explanations = explain_together(readers, arguments.prompt, answers)
    write_page(arguments.out, explanations)
    print(f"page: {arguments.out}")
    if arguments.png:
        write_figure(arguments.png, explanations)
        print(f"picture: {arguments.png}")


def _unlike(names: Iterable[str], folder: Path) -> str:
    """A name for the model in `folder` that is not among `names`: with as much of its path as that takes."""
    parts = folder.absolute().parts
    tails = ("/".join(parts[start:]) for start in range(len(parts) - 1, 0, -1))
    return next((tail for tail in tails if tail not in names), f"{folder} again")
