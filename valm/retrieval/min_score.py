"""The score threshold `min_score`: a token whose best image scores below it sees none of its K images.

Retrieval always finds something. Most words of prose are not shown by a picture, and there the nearest images only
disturb. In a finished model of the first study (studies/color/archive.md, seed 0), a score threshold of 0.62 without
further training lowered the perplexity of photo captions from 1.32 to 0.65 times that of the text-only baseline. On
questions about colours 44.6 of 45.2 points stayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from valm.errors import ValmError

# `choose_min_score` takes the images away from at most this share of the questions, or leaves them to at most this
# share of the tokens of ordinary text.
PERCENT = 5.0


def cut(ids: Tensor, scores: Tensor, min_score: float | None) -> tuple[Tensor, Tensor]:
    """Ids or rows, and scores, (..., K) each; -1 and -inf for tokens whose scores are all below `min_score`."""
    if min_score is None:
        return ids, scores
    none = (scores < min_score).all(-1, keepdim=True)
    return ids.masked_fill(none, -1), scores.masked_fill(none, -torch.inf)


def set_min_score(model: Any, value: float, name: object) -> None:
    """Sets the score threshold of `model`. Warns, with its `name`, if the model retrieves no images."""
    if model.fusion_options.retrieves:
        model.set_min_score(value)
    else:
        warnings.warn(f"--min-score has no effect on {name}, which retrieves no images", stacklevel=2)


def choose_min_score(questions: Iterable[np.ndarray] | None = None, text: Iterable[np.ndarray] | None = None) -> float:
    """The score threshold at which nearly all questions keep their images, or nearly no token of a text does.

    It has four decimals, so that every device chooses the same number.

    Args:
        questions: the retrieval scores (T, K) of each question, whose last token must see its images. At most PERCENT
            of the questions lose their images; with fewer than 100 / PERCENT questions, none does.
        text: instead, the scores (T, K) of documents that need no images. At most PERCENT of the tokens keep theirs.

    Raises:
        ValmError: no token has images.
    """
    if questions is not None:
        best = np.array([scores[-1].max() for scores in questions], np.float64)
        what = "questions"
    else:
        best = np.concatenate([np.empty(0), *(scores.max(-1) for scores in text or ())])
        what = "text"
    best = np.sort(best[np.isfinite(best)])  # the first token of a document has no images
    if len(best) == 0:
        raise ValmError(f"the {what} to choose min_score from has no token with images")
    few = int(len(best) * PERCENT / 100)
    # rounded down, so that the lowest kept score still reaches it; or up, so that the highest removed score does not
    steps = np.floor(best[few] * 1e4) if questions is not None else np.floor(best[-few - 1] * 1e4) + 1
    return float(steps / 1e4)
