"""Runs a `RetrievalPlan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from valm.corpus.plan import RetrievalPlan
from valm.knowledge_base.store import ImageKnowledgeBase

if TYPE_CHECKING:  # imports that take seconds come after the check of the plan
    from valm.corpus.retrieved import CorpusRetrieval
    from valm.retrieval.retriever import Retriever


def run_retrieval(plan: RetrievalPlan) -> CorpusRetrieval:
    """Retrieves the images of every token of `plan.corpus`, and writes them to `plan.out`.

    Returns:
        The opened result: document i is `{"input_ids": (T,) int32, "image_ids": (T, K) int64}`, with `image_scores`
        (T, K) float32 if `plan.scores`.

    Raises:
        ValmError: fields do not go together, or files cannot be read or do not belong together; or as in
            `retrieve_corpus`.

    Example:
        >>> from valm.corpus.plan import RetrievalPlan
        >>> from valm.corpus.run import run_retrieval
        >>> from valm.corpus.texts import TextCorpus
        >>> plan = RetrievalPlan(corpus=TextCorpus(["corpus.txt"]), kb="kb", out="retrieved", images=2)
        >>> run_retrieval(plan)[0]["image_ids"].shape
        (..., 2)
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
    """The retriever that finds the images of `plan` in its knowledge base. Errors are those of `run_retrieval`."""
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
