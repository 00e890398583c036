"""The corpus of a command: files and folders, or a Hugging Face dataset."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from valm.errors import ValmError

if TYPE_CHECKING:
    from valm.corpus.retrieved import CorpusRetrieval
    from valm.retrieval.retriever import Retriever
    from valm.store.shards import Runner

# The options of a dataset, and their names in `open_dataset`.
DATASET_OPTIONS = {"dataset_config": "config", "dataset_split": "split", "streaming": "streaming"}


def add_corpus(parser: argparse.ArgumentParser) -> None:
    """Declares the options that the other functions here read."""
    parser.add_argument(
        "corpus",
        type=Path,
        nargs="*",
        help="text files, one document a line; .jsonl, .json, .csv, .tsv or .parquet files, one document a row; all "
        "but .parquet may end in .gz; folders of them",
    )
    parser.add_argument("--dataset", help="Hugging Face dataset (name or folder), instead of files")
    parser.add_argument("--dataset-config", help="of a dataset that has several")
    parser.add_argument("--dataset-split", help="of the dataset (default: train)")
    parser.add_argument("--streaming", action="store_true", default=None, help="read the dataset as it is downloaded")
    parser.add_argument("--column", default="text", help="where the text is in all but text files")


def has_corpus(arguments: argparse.Namespace) -> bool:
    """Whether a corpus was given."""
    return bool(arguments.corpus) or arguments.dataset is not None


def corpus_documents(arguments: argparse.Namespace) -> Iterator[str]:
    """Every document of the corpus, in order.

    Raises:
        ValmError: the corpus cannot be read.
    """
    from valm.corpus.parts import read_documents

    if _is_dataset(arguments):
        return _dataset_documents(arguments)
    return read_documents(arguments.corpus, column=arguments.column)


def retrieve_documents(
    arguments: argparse.Namespace, retriever: Retriever, out: Path, *, scores: bool, run: Runner | None = None
) -> CorpusRetrieval:
    """Retrieves the images of the corpus' tokens into `out`, here or by `run`. Errors as in `retrieve_files`."""
    from valm.corpus.retrieved import retrieve_files, retrieve_texts
    from valm.store.shards import run_here

    run = run or run_here
    if _is_dataset(arguments):
        return retrieve_texts(_dataset_documents(arguments), retriever, out, scores=scores, run=run)
    return retrieve_files(arguments.corpus, retriever, out, column=arguments.column, scores=scores, run=run)


def _is_dataset(arguments: argparse.Namespace) -> bool:
    """Whether the corpus is a dataset.

    Raises:
        ValmError: both files and a dataset are given, or options of a dataset without one.
    """
    if arguments.dataset is not None and arguments.corpus:
        raise ValmError("give either corpus files or --dataset")
    if arguments.dataset is None:
        for name in DATASET_OPTIONS:
            if getattr(arguments, name) is not None:
                raise ValmError(f"--{name.replace('_', '-')} is of a Hugging Face dataset: give --dataset too")
    return arguments.dataset is not None


def _dataset_documents(arguments: argparse.Namespace) -> Iterator[str]:
    from valm.corpus.parts import row_documents
    from valm.knowledge_base.sources.huggingface import open_dataset

    given = {option: getattr(arguments, name) for name, option in DATASET_OPTIONS.items()}
    options = {option: value for option, value in given.items() if value is not None}
    return row_documents(open_dataset(arguments.dataset, **options), arguments.column)
