"""valm train."""

from __future__ import annotations

import argparse
from pathlib import Path

from valm.cli.options import Commands, command, positive
from valm.errors import ValmError


def add_to(commands: Commands) -> None:
    train = command(commands, "train", run_train, "train a VaLM, or without --kb its text-only twin GPT-2*")
    train.add_argument("corpus", type=Path, help="text file, one document a line")
    train.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    train.add_argument("--kb", type=Path, help="knowledge base; without it the model sees no pictures")
    train.add_argument("--clip", help="the CLIP whose tokenizer the model reads with (default: that of --kb)")
    train.add_argument("-k", "--images", type=positive, default=4, help="pictures a token sees")
    train.add_argument("--query", choices=["eot", "state"], default="eot", help="kind of the retrieval query")
    train.add_argument("--layers", type=positive, default=12)
    train.add_argument("--width", type=positive, default=768)
    train.add_argument("--heads", type=positive, default=12)
    train.add_argument("--context", type=positive, default=512, help="most tokens of a document")
    train.add_argument("--steps", type=positive, default=1000)
    train.add_argument("--batch-size", type=positive, default=16, help="documents a step")
    train.add_argument("--lr", type=float, default=5e-4)
    train.add_argument("--seed", type=int, default=0)


def run_train(arguments: argparse.Namespace) -> None:
    import torch

    from valm.checkpoint import save_retrieval
    from valm.config import ValmConfig
    from valm.files import writable_folder
    from valm.model import VaLMForCausalLM
    from valm.retrieval.cache import retrieve_corpus
    from valm.retrieval.clip import Clip
    from valm.retrieval.context import ContextEncoder
    from valm.retrieval.knowledge_base import ImageKnowledgeBase
    from valm.retrieval.retriever import Retriever
    from valm.tokenizer import clip_tokenizer
    from valm.training.collate import tokenize_documents
    from valm.training.train import train

    try:
        texts = arguments.corpus.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValmError(f"the corpus {arguments.corpus} is not UTF-8 text: {error}") from error
    if any(writable_folder(arguments.out).iterdir()):
        raise ValmError(f"the output folder {arguments.out} is not empty; choose another")
    kb = ImageKnowledgeBase.open(arguments.kb) if arguments.kb else None
    if kb is not None:
        clip = kb.load_clip(arguments.clip)
        tokenizer = clip.tokenizer
    else:
        tokenizer = Clip.load(arguments.clip).tokenizer if arguments.clip else clip_tokenizer()
    config = ValmConfig(
        vocab_size=len(tokenizer),
        n_positions=arguments.context,
        n_layer=arguments.layers,
        n_embd=arguments.width,
        n_head=arguments.heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        image_dim=kb.dim if kb is not None else arguments.width,
        num_images=arguments.images if kb is not None else 0,
    )
    documents = tokenize_documents(texts, tokenizer, arguments.context)
    dataset = [{"input_ids": document} for document in documents]
    if kb is not None:
        retriever = Retriever(ContextEncoder(clip, query=arguments.query), kb, arguments.images)
        dataset = retrieve_corpus(documents, retriever, arguments.out / "retrieval")
    torch.manual_seed(arguments.seed)
    losses = train(
        VaLMForCausalLM(config),
        dataset,
        kb,
        arguments.out,
        tokenizer=tokenizer,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        seed=arguments.seed,
        row_length=arguments.context,
    )
    if kb is not None:
        save_retrieval(arguments.out, retriever)
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; written to {arguments.out}")
