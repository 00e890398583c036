"""Runs a `RetrievalPlan`: a retrieval from beginning to end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from valm.corpus.plan import RetrievalPlan
from valm.knowledge_base.store import ImageKnowledgeBase

if TYPE_CHECKING:  # what takes seconds to import comes after the check of what is given
    from valm.corpus.retrieved import CorpusRetrieval
    from valm.retrieval.retriever import Retriever


def run_retrieval(plan: RetrievalPlan) -> CorpusRetrieval:
    """Retrieves the images of every token of `plan.corpus`, and writes them to `plan.out`.

    Raises:
        ValmError: fields do not go together; something cannot be read or does not belong together; or as in
            `retrieve_corpus`.
    """
    plan.check()
    kb, documents = ImageKnowledgeBase.open(plan.kb), plan.corpus.documents()

    from valm.corpus.retrieved import note_clip, retrieve_corpus

    run = plan.runner()
    found = retrieve_corpus(documents, open_retriever(plan, kb), plan.out, scores=plan.scores, run=run)
    if plan.clip is not None:
        note_clip(found.path, plan.clip)
    return found


def open_retriever(plan: RetrievalPlan, kb: ImageKnowledgeBase) -> Retriever:
    """What finds the images of `plan` in its knowledge base. Errors as in `run_retrieval`."""
    import torch

    from valm.clip.tokenizer import load_tokenizer
    from valm.retrieval.ray_index import ShardedIndex
    from valm.retrieval.retriever import Retriever
    from valm.retrieval.source import open_encoder

    encoder = open_encoder(
        kb,
        plan.query,
        load_tokenizer(plan.tokenizer, chats=True) if plan.tokenizer else None,
        clip=plan.clip,
        allow_download=plan.allow_download,
        device=plan.opened_device(),
        dtype=getattr(torch, plan.query_dtype),
    )
    index: Any = None
    if plan.search_actors is not None and plan.ray is not None:
        index = ShardedIndex(kb, plan.search_actors, plan.ray, cpus=plan.cpus)
    return Retriever(encoder, kb, plan.images, index)
