"""valm distill."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from valm.cli.options import (
    Commands,
    add_clip,
    add_device,
    add_query_dtype,
    chosen_device,
    chosen_query_dtype,
    command,
    positive,
    seed,
)


def add_to(commands: Commands) -> None:
    distill = command(
        commands,
        "distill",
        run_distill,
        "train a head of a VaLM that predicts CLIP's queries, so that it retrieves without CLIP's text tower "
        "(experimental); nothing else of the model changes",
    )
    distill.add_argument("model", type=Path, help="checkpoint folder of a VaLM")
    distill.add_argument(
        "--retrieval", type=Path, required=True, help="text to train on, with its images: a result of `valm retrieve`"
    )
    distill.add_argument("--out", type=Path, required=True, help="folder of the model with its head")
    distill.add_argument("--steps", type=positive, default=1000, help="updates")
    distill.add_argument("--batch-size", type=positive, default=64, help="documents a step")
    distill.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    distill.add_argument("--seed", type=seed, default=0, help="of the head's weights and the order of the documents")
    distill.add_argument("--kb", type=Path, help="another knowledge base than the checkpoint was trained with")
    add_clip(distill)
    add_query_dtype(distill)
    add_device(distill)


def run_distill(arguments: argparse.Namespace) -> None:
    from valm.store.files import output_folder
    from valm.training.launch import check_alone

    check_alone("valm distill")
    with output_folder(arguments.out) as out:
        train(arguments, out)


def train(arguments: argparse.Namespace, out: Path) -> None:
    import torch

    from valm.corpus.retrieved import CorpusRetrieval
    from valm.model.checkpoint import load, save_checkpoint
    from valm.retrieval.note import RetrievalNote, open_encoder
    from valm.training.distill import distill_queries

    model, tokenizer = load(arguments.model, device=chosen_device(arguments))
    kb = RetrievalNote.chosen(arguments.model, arguments.kb).open_knowledge_base()
    corpus = CorpusRetrieval.open(arguments.retrieval)
    encoder = open_encoder(
        kb,
        corpus.query,
        tokenizer,
        clip=arguments.clip,
        allow_download=arguments.allow_download,
        device=model.device,
        dtype=chosen_query_dtype(arguments) or torch.float32,
        **corpus.segments,
    )
    agreement = distill_queries(
        model,
        tokenizer,
        corpus,
        kb,
        encoder,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        seed=arguments.seed,
    )
    save_checkpoint(
        model,
        tokenizer,
        out,
        numbers={"cosine to CLIP's queries": agreement.cosine, "share of CLIP's images found": agreement.overlap},
        command=shlex.join(["valm", *arguments.command_line]),
    )
    print(
        f"{agreement.tokens:,} tokens held out: cosine {agreement.cosine:.3f} to the {corpus.query} queries, "
        f"{agreement.overlap:.1%} of their {corpus.k} images found too; written to {out}"
    )
