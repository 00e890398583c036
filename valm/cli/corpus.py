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
        help="text files with a document on each line; .jsonl, .json, .csv, .tsv or .parquet files with a document in "
        "each row; folders of these files; all but .parquet may be compressed (.gz). A folder or zip file of pictures "
        "is read for its captions",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME[:CONFIG[:SPLIT]]",
        help="Hugging Face dataset instead of files: a name or a folder; the split may be a slice, such as "
        "NAME::train[:10%%] (default: train)",
    )
    parser.add_argument("--streaming", action="store_true", help="read the dataset while it is downloaded")
    parser.add_argument("--column", default="text", help="column or field that contains the text, except in text files")


def chosen_corpus(arguments: argparse.Namespace) -> TextCorpus | None:
    """The value of the options of `add_corpus`; None if no corpus was given.

    Raises:
        ValmError: the options contradict each other.
    """
    from valm.corpus.texts import TextCorpus

    found = TextCorpus(
        files=arguments.corpus,
        dataset=arguments.dataset,
        streaming=arguments.streaming,
        column=arguments.column,
        captions=getattr(arguments, "captions", None),  # an option of `valm retrieve`
    )
    return found if found.files or found.dataset else None
