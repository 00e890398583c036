"""The corpus of a command: files and folders, or a Hugging Face dataset."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from valm.corpus.texts import TextCorpus


def add_corpus(parser: argparse.ArgumentParser) -> None:
    """Declares the options that `chosen_corpus` reads."""
    parser.add_argument(
        "corpus",
        type=Path,
        nargs="*",
        help="text files, one document a line; .jsonl, .json, .csv, .tsv or .parquet files, one document a row; all "
        "but .parquet may end in .gz; folders of them",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME[:CONFIG[:SPLIT]]",
        help="Hugging Face dataset, by its name or folder, instead of files; the split may be a slice, such as "
        "NAME::train[:10%%] (default: train)",
    )
    parser.add_argument("--streaming", action="store_true", help="read the dataset as it is downloaded")
    parser.add_argument("--column", default="text", help="where the text is in all but text files")


def chosen_corpus(arguments: argparse.Namespace) -> TextCorpus | None:
    """The value of the options of `add_corpus`; None if no corpus was given.

    Raises:
        ValmError: they do not go together.
    """
    from valm.corpus.texts import TextCorpus

    found = TextCorpus(
        files=arguments.corpus,
        dataset=arguments.dataset,
        streaming=arguments.streaming,
        column=arguments.column,
    )
    return found if found.files or found.dataset else None
