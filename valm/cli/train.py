"""valm train."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valm.cli.corpus import add_corpus, corpus_documents, has_corpus, retrieve_documents
from valm.cli.options import Commands, add_allow_download, add_device, chosen_device, command, positive
from valm.errors import ValmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from valm.corpus.retrieved import CorpusRetrieval
    from valm.knowledge_base.store import ImageKnowledgeBase

# Where, in the folder of the checkpoint, the pictures of a corpus are kept that was given as text.
RETRIEVAL = "retrieval"


def add_to(commands: Commands) -> None:
    train = command(commands, "train", run_train, "train a VaLM, or without --kb its text-only twin GPT-2*")
    add_corpus(train)
    train.add_argument(
        "--retrieval", type=Path, help="train on what `valm retrieve` wrote, without CLIP, instead of on a corpus"
    )
    train.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    train.add_argument("--kb", type=Path, help="knowledge base; without it the model sees no pictures")
    train.add_argument("--clip", help="the CLIP whose tokenizer the model reads with (default: that of --kb)")
    add_allow_download(train)
    train.add_argument("--tokenizer", help="another tokenizer for the model: folder or Hugging Face name")
    train.add_argument("-k", "--images", type=positive, help="pictures a token sees (default: 4)")
    train.add_argument("--query", choices=["eot", "state"], help="kind of the retrieval query (default: eot)")
    train.add_argument("--layers", type=positive, default=12)
    train.add_argument("--width", type=positive, default=768)
    train.add_argument("--heads", type=positive, default=12)
    train.add_argument("--context", type=positive, default=512, help="most tokens of a document, longer ones are cut")
    train.add_argument("--steps", type=positive, default=1000)
    train.add_argument("--batch-size", type=positive, default=16, help="documents a step")
    train.add_argument("--lr", type=float, default=5e-4)
    train.add_argument("--seed", type=int, default=0)
    add_device(train, "pictures are retrieved (training itself takes the GPUs that torch has)")


def run_train(arguments: argparse.Namespace) -> None:
    import torch

    from valm.checkpoint import save_retrieval
    from valm.config import ValmConfig
    from valm.corpus.retrieved import CorpusRetrieval
    from valm.files import writable_folder
    from valm.knowledge_base.store import ImageKnowledgeBase
    from valm.model import VaLMForCausalLM
    from valm.training.train import train
    from valm_kernels.atomic_files import is_temporary, remove_leftovers

    if has_corpus(arguments) == (arguments.retrieval is not None):
        raise ValmError("give either a corpus or --retrieval")
    # a retrieval that was killed goes on
    out = writable_folder(arguments.out)
    remove_leftovers(out)
    if any(file.name != RETRIEVAL and not is_temporary(file.name) for file in out.iterdir()):
        raise ValmError(f"the output folder {arguments.out} is not empty; choose another")
    kb = ImageKnowledgeBase.open(arguments.kb) if arguments.kb else None
    dataset: CorpusRetrieval | list[dict[str, Any]]
    if arguments.retrieval is not None:
        dataset, tokenizer = open_retrieval(arguments)
    elif kb is not None:
        dataset, tokenizer = retrieved_corpus(arguments, kb)
    else:
        dataset, tokenizer = plain_corpus(arguments)
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
        num_images=dataset.k if kb is not None and isinstance(dataset, CorpusRetrieval) else 0,
    )
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
    if kb is not None and isinstance(dataset, CorpusRetrieval):
        save_retrieval(arguments.out, kb, dataset.query)
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; written to {arguments.out}")


def open_retrieval(arguments: argparse.Namespace) -> tuple[CorpusRetrieval, PreTrainedTokenizerFast]:
    from valm.corpus.retrieved import CorpusRetrieval

    decided = {
        "--clip": arguments.clip,
        "--tokenizer": arguments.tokenizer,
        "-k": arguments.images,
        "--query": arguments.query,
    }
    given = next((name for name, value in decided.items() if value is not None), None)
    if given is not None:
        raise ValmError(f"{given} was decided when {arguments.retrieval} was retrieved; leave it out")
    found = CorpusRetrieval.open(arguments.retrieval)
    return found, found.tokenizer


def retrieved_corpus(
    arguments: argparse.Namespace, kb: ImageKnowledgeBase
) -> tuple[CorpusRetrieval, PreTrainedTokenizerFast]:
    from valm.retrieval.context import ContextEncoder
    from valm.retrieval.retriever import Retriever
    from valm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    clip = kb.load_clip(arguments.clip, allow_download=arguments.allow_download).to(chosen_device(arguments))
    encoder = ContextEncoder(clip, tokenizer=tokenizer, query=arguments.query or "eot")
    retriever = Retriever(encoder, kb, arguments.images or 4)
    return retrieve_documents(arguments, retriever, arguments.out / RETRIEVAL), encoder.tokenizer


def plain_corpus(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], PreTrainedTokenizerFast]:
    from valm.clip import Clip
    from valm.tokenizer import clip_tokenizer, load_tokenizer, tokenize_documents

    if arguments.tokenizer:
        tokenizer = load_tokenizer(arguments.tokenizer)
    else:
        tokenizer = Clip.load(arguments.clip).tokenizer if arguments.clip else clip_tokenizer()
    documents = tokenize_documents(list(corpus_documents(arguments)), tokenizer)
    return [{"input_ids": document} for document in documents], tokenizer
