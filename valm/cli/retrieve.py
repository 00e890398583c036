"""valm retrieve."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from valm.cli.corpus import add_corpus, chosen_corpus
from valm.cli.options import (
    Commands,
    add_clip,
    add_device,
    add_query_dtype,
    add_ray,
    chosen_device,
    chosen_query_dtype,
    chosen_run,
    command,
    positive,
)
from valm.errors import ValmError

if TYPE_CHECKING:
    from valm.retrieval.retriever import VectorIndex


def add_to(commands: Commands) -> None:
    retrieve = command(
        commands, "retrieve", run_retrieve, "find the images of every token of a corpus once, to train on them"
    )
    add_corpus(retrieve)
    retrieve.add_argument("--kb", type=Path, required=True, help="knowledge base")
    retrieve.add_argument("--out", type=Path, required=True, help="folder of the result; a killed retrieval resumes")
    add_clip(retrieve)
    retrieve.add_argument(
        "--tokenizer",
        help="the tokenizer of the model to be trained, where it is not CLIP's: folder or Hugging Face name",
    )
    retrieve.add_argument("-k", "--images", type=positive, default=4, help="images a token sees")
    retrieve.add_argument("--query", choices=["eot", "state"], default="eot", help="kind of the retrieval query")
    retrieve.add_argument(
        "--scores",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the score of each image too, for `valm train --min-score` and --score-scale",
    )
    add_query_dtype(retrieve)
    retrieve.add_argument(
        "--search-actors",
        type=positive,
        help="with --ray, spread the search over so many actors, which share the vectors; without, each process that "
        "does tasks opens the whole knowledge base or its index",
    )
    add_device(retrieve)
    add_ray(retrieve)


def run_retrieve(arguments: argparse.Namespace) -> None:
    import torch

    from valm.clip.tokenizer import load_tokenizer
    from valm.corpus.retrieved import retrieve_corpus
    from valm.knowledge_base.store import ImageKnowledgeBase
    from valm.retrieval.retriever import Retriever
    from valm.retrieval.source import open_encoder
    from valm.training.launch import check_alone
    from valm_kernels import MAX_IMAGES

    check_alone("valm retrieve")
    corpus = chosen_corpus(arguments)
    if corpus is None:
        raise ValmError("there is no corpus: give its files, or --dataset")
    if arguments.images > MAX_IMAGES:
        raise ValmError(f"a token sees {MAX_IMAGES} images at most: give -k {MAX_IMAGES} or less")
    if arguments.search_actors is not None and arguments.ray is None:
        raise ValmError("--search-actors are of a Ray cluster: give --ray too")
    kb = ImageKnowledgeBase.open(arguments.kb)
    tokenizer = load_tokenizer(arguments.tokenizer, chats=True) if arguments.tokenizer else None
    encoder = open_encoder(
        kb,
        arguments.query,
        tokenizer,
        clip=arguments.clip,
        allow_download=arguments.allow_download,
        device=chosen_device(arguments),
        dtype=chosen_query_dtype(arguments) or torch.float32,
    )
    run = chosen_run(arguments)
    index: VectorIndex | None = None
    if arguments.search_actors is not None:
        from valm.retrieval.ray_index import ShardedIndex

        index = ShardedIndex(kb, arguments.search_actors, arguments.ray, cpus=arguments.cpus)
    retriever = Retriever(encoder, kb, arguments.images, index)
    found = retrieve_corpus(corpus.documents(), retriever, arguments.out, scores=arguments.scores, run=run)
    print(f"{found.path}: {len(found):,} documents, {found.manifest['tokens']:,} tokens, {found.k} images a token")
