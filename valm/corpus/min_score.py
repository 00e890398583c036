"""Chooses the score threshold `min_score` from the captions of a knowledge base, or from the user's texts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator

import numpy as np

from valm.clip.tokenizer import batches_by_length, padded, prompt_ids
from valm.corpus.retrieved import BATCH_TOKENS
from valm.corpus.texts import read_documents
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.min_score import PERCENT, choose_min_score
from valm.retrieval.retriever import Retriever

# With fewer captions, the threshold that PERCENT of them miss is their lowest score.
FEWEST = int(100 / PERCENT)
# Captions that are read, from images evenly spaced in the knowledge base.
CAPTIONS = 1000
# Texts that are read ahead, so that texts of equal length share a search.
WINDOW = 256


def find_min_score(
    retriever: Retriever,
    *,
    questions: str | os.PathLike | None = None,
    ordinary_text: str | os.PathLike | None = None,
) -> float:
    """The score threshold that `choose_min_score` finds for texts whose last token needs images, or for texts that need
    no images. By default the texts are captions of the knowledge base, whose last tokens need images.

    Args:
        retriever: finds the images of the texts.
        questions: a text file whose lines need images at their last tokens, instead of the captions.
        ordinary_text: instead, a text file that needs no images.

    Raises:
        ValmError: the file cannot be read, there are no captions, or no token has images.
    """
    if ordinary_text is not None:
        return choose_min_score(text=_scores(read_documents([ordinary_text]), retriever))
    texts = captions_of(retriever.kb) if questions is None else read_documents([questions])
    if questions is None and not texts:
        raise ValmError(
            f"the knowledge base {retriever.kb.path} has no captions to choose min_score from: name texts whose last "
            "tokens need images (--questions) or texts that need none (--ordinary-text)"
        )
    return choose_min_score(questions=_scores(texts, retriever))


def captions_of(kb: ImageKnowledgeBase) -> list[str]:
    """The first captions of some images."""
    images = np.unique(np.linspace(0, len(kb) - 1, CAPTIONS, dtype=int))
    return [caption for image in images if (caption := kb.item(int(image)).caption.split("\n")[0])]


def _scores(texts: Iterable[str], retriever: Retriever) -> Iterator[np.ndarray]:
    """The retrieval scores (T, K) of each text. The order of texts may change."""
    texts = iter(texts)
    while window := list(itertools.islice(texts, WINDOW)):
        rows = [prompt_ids(retriever.encoder.tokenizer, text) for text in window]
        for batch in batches_by_length(list(map(len, rows)), BATCH_TOKENS):
            _, scores = retriever.find(*padded([rows[index] for index in batch]))
            for index, found in zip(batch, scores.cpu().numpy(), strict=True):
                yield found[: len(rows[index])]
