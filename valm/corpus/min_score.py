"""Chooses `min_score` (`valm.retrieval.min_score`) from texts that the user names."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from valm.clip.tokenizer import batches_by_length, padded, prompt_ids
from valm.corpus.retrieved import BATCH_TOKENS, CorpusRetrieval
from valm.corpus.texts import read_documents
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.min_score import choose_min_score
from valm.retrieval.retriever import Retriever

NO_SCORES = "has no retrieval scores: retrieve it again, `valm retrieve CORPUS --kb KB --out FOLDER` writes them"
# Texts that are read ahead, to find the images of equally long ones together.
WINDOW = 256


def find_min_score(
    kb: ImageKnowledgeBase,
    query: str,
    tokenizer: PreTrainedTokenizerFast,
    retriever: Retriever | None,
    *,
    questions: str | os.PathLike | None = None,
    ordinary_text: str | os.PathLike | None = None,
) -> float:
    """The min_score that `choose_min_score` takes for texts at whose last tokens images matter, or for texts that need
    none. Either is a text file, or a result of `valm retrieve`.

    Args:
        kb, query, tokenizer: the model's knowledge base, kind of query and tokenizer.
        retriever: finds the images of texts; None: only results of `valm retrieve` can be read.

    Raises:
        ValmError: the texts cannot be read, were retrieved from another knowledge base, with another kind of query,
            another tokenizer or without scores, or have no token with images.
    """
    source = ordinary_text if questions is None else questions
    assert source is not None  # as the plan of a training checks
    path = Path(source)
    found = _stored_scores(path, kb, query, tokenizer) if path.is_dir() else _scores_of(path, retriever)
    return choose_min_score(**{"text" if questions is None else "questions": found})


def _stored_scores(
    folder: Path, kb: ImageKnowledgeBase, query: str, tokenizer: PreTrainedTokenizerFast
) -> Iterator[np.ndarray]:
    """The retrieval scores (T, K) of each document in `folder`, without the eos behind its text."""
    corpus = CorpusRetrieval.open(folder)
    corpus.check_knowledge_base(kb)
    corpus.check_tokenizer(tokenizer)
    if corpus.query != query:
        raise ValmError(f"{folder} was retrieved with {corpus.query!r} queries, and the model has {query!r} ones")
    if not corpus.has_scores:
        raise ValmError(f"{folder} {NO_SCORES}")
    eos = corpus.tokenizer.eos_token_id
    for number in range(len(corpus)):
        document = corpus[number]
        yield document["image_scores"][: -1 if document["input_ids"][-1] == eos else None]


def _scores_of(file: Path, retriever: Retriever | None) -> Iterator[np.ndarray]:
    """The retrieval scores (T, K) of each document in the text `file`, in any order."""
    if retriever is None:
        raise ValmError(f"the corpus was retrieved: retrieve {file} too, and give that folder")
    texts = read_documents([file])
    while window := list(itertools.islice(texts, WINDOW)):
        rows = [prompt_ids(retriever.encoder.tokenizer, text) for text in window]
        for batch in batches_by_length(list(map(len, rows)), BATCH_TOKENS):
            _, scores = retriever.find(*padded([rows[index] for index in batch]))
            for index, found in zip(batch, scores.cpu().numpy(), strict=True):
                yield found[: len(rows[index])]
