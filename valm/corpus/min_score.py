"""Chooses `min_score` (`valm.retrieval.min_score`) from texts that the user names."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from valm.corpus.parts import read_documents
from valm.corpus.retrieved import CorpusRetrieval
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.min_score import choose_min_score
from valm.retrieval.retriever import Retriever

AUTO = "auto"
NO_SCORES = "has no retrieval scores: retrieve it again, `valm retrieve CORPUS --kb KB --out FOLDER` writes them"
# Texts whose images are found at once.
BATCH_TEXTS = 64


@dataclass(frozen=True)
class MinScore:
    """The options --min-score, --questions and --ordinary-text, whose names the error messages use.

    Attributes:
        score: a number, or AUTO.
        questions: of AUTO, texts at whose last tokens images matter.
        ordinary_text: of AUTO instead, texts that need none. Both are a text file, or a result of `valm retrieve`.
    """

    score: float | str
    questions: str | os.PathLike | None = None
    ordinary_text: str | os.PathLike | None = None

    def check(self) -> None:
        """Checks the options against each other.

        Raises:
            ValmError: they do not go together.
        """
        given = [source for source in (self.questions, self.ordinary_text) if source is not None]
        if self.score != AUTO and given:
            raise ValmError("--questions and --ordinary-text choose the min_score: give --min-score auto with them")
        if self.score == AUTO and len(given) != 1:
            raise ValmError("--min-score auto chooses it from texts: give either --questions or --ordinary-text")
        if isinstance(self.score, str) and self.score != AUTO:
            raise ValmError(f"--min-score must be a number or {AUTO}, got {self.score!r}")

    def set(self, model: Any, name: object) -> None:
        """Sets that of `model`, one that takes images; of one that retrieves none a warning says so, with its `name`.

        Raises:
            ValmError: as `find`, or the model's knowledge base is missing.
        """
        images = model.image_options
        if images.num_images == 0 or images.blind:
            warnings.warn(f"--min-score changes nothing of {name}, which retrieves no images", stacklevel=2)
            return
        value = self.score
        if isinstance(value, str):
            retriever = model.retriever
            if not isinstance(retriever, Retriever):
                raise ValmError(f"--min-score auto: {name} has no knowledge base: give it as kb (--kb)")
            value = self.find(retriever.kb, retriever)
        model.set_min_score(value)

    def find(self, kb: ImageKnowledgeBase, retriever: Retriever | None) -> float:
        """The number.

        Args:
            kb: the model's knowledge base.
            retriever: finds the images of texts; None: only results of `valm retrieve` can be read.

        Raises:
            ValmError: as `check`; or the texts cannot be read, were retrieved from another knowledge base or without
                scores, or have no token with images.
        """
        self.check()
        if not isinstance(self.score, str):
            return self.score
        if self.questions is not None:
            return choose_min_score(questions=_scores_of(Path(self.questions), kb, retriever))
        assert self.ordinary_text is not None  # as `check` found
        return choose_min_score(text=_scores_of(Path(self.ordinary_text), kb, retriever))


def _scores_of(source: Path, kb: ImageKnowledgeBase, retriever: Retriever | None) -> Iterator[np.ndarray]:
    """The retrieval scores (T, K) of each document in `source`, a text file or a result of `valm retrieve`."""
    if source.is_dir():
        corpus = CorpusRetrieval.open(source)
        corpus.check_knowledge_base(kb)
        if not corpus.has_scores:
            raise ValmError(f"{source} {NO_SCORES}")
        for number in range(len(corpus)):
            yield corpus[number]["image_scores"]
        return
    if retriever is None:
        raise ValmError(f"the corpus was retrieved: retrieve {source} too, and give that folder")
    texts = iter(read_documents([source]))
    retriever = retriever.with_min_score(None)
    while batch := list(itertools.islice(texts, BATCH_TEXTS)):
        ids, scores = retriever.find(batch)
        last = (ids[..., 0] >= 0).cpu().numpy()
        for row, found in zip(scores.cpu().numpy(), last, strict=True):
            yield row[: int(np.flatnonzero(found).max(initial=0)) + 1]  # without padding
