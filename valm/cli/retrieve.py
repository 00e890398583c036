"""valm retrieve."""

from __future__ import annotations

import argparse
from pathlib import Path

from valm.cli.corpus import add_corpus, chosen_corpus
from valm.cli.options import Commands, command
from valm.corpus.plan import RetrievalPlan
from valm.errors import ValmError
from valm.options import add_fields, given_fields

EXAMPLE = "valm retrieve corpus.txt --kb kb --tokenizer base --out retrieved"


def add_to(commands: Commands) -> None:
    help = "retrieve the images of every token of a corpus, to train on them"
    retrieve = command(commands, "retrieve", run_retrieve, help, EXAMPLE)
    add_corpus(retrieve)
    captions = "table of captions, if it is not in the folder or zip file of the pictures"
    retrieve.add_argument("--captions", type=Path, help=captions)
    add_fields(retrieve, RetrievalPlan)


def run_retrieve(arguments: argparse.Namespace) -> None:
    from valm.corpus.run import run_retrieval
    from valm.training.launch import check_alone

    check_alone("valm retrieve")
    corpus = chosen_corpus(arguments)
    if corpus is None:
        raise ValmError("there is no corpus: give files, or --dataset")
    found = run_retrieval(RetrievalPlan(**given_fields(RetrievalPlan, arguments) | {"corpus": corpus}))
    print(f"{found.path}: {len(found):,} documents, {found.manifest['tokens']:,} tokens, {found.k} images a token")
