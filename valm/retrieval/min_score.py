"""`min_score`: a token whose best image is found with less certainty than this sees none of its K images.

Retrieval always finds something. Prose has few words that a picture shows, and there the nearest images only disturb.
In a finished model of the first study (studies/color/archive.md, seed 0) a cut at 0.62, nothing trained again, brought
the perplexity of photo captions from 1.32 to 0.65 times that of the text-only twin, and 44.6 of 45.2 points on
questions about colours stayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from valm.errors import ValmError

# `choose_min_score` keeps the images of all but so many percent of the questions, and of so many percent of the tokens
# of ordinary text.
PERCENT = 5.0


def cut(ids: Tensor, scores: Tensor, min_score: float | None) -> tuple[Tensor, Tensor]:
    """Ids or rows, and scores, (..., K) each, with none (-1 and -inf) where the token's are all below `min_score`."""
    if min_score is None:
        return ids, scores
    none = (scores < min_score).all(-1, keepdim=True)
    return ids.masked_fill(none, -1), scores.masked_fill(none, -torch.inf)


def set_min_score(model: Any, value: float, name: object) -> None:
    """Sets that of `model`, one that takes images; of one that retrieves none a warning says so, with its `name`."""
    if model.fusion_options.retrieves:
        model.set_min_score(value)
    else:
        warnings.warn(f"--min-score changes nothing of {name}, which retrieves no images", stacklevel=2)


def choose_min_score(questions: Iterable[np.ndarray] | None = None, text: Iterable[np.ndarray] | None = None) -> float:
    """The `min_score` at which nearly all questions keep their images, or nearly no token of a text has any.

    Args:
        questions: the retrieval scores (T, K) of each question, whose last token must see its images. At most PERCENT
            of them lose theirs; of fewer than 100 / PERCENT, none.
        text: instead, the scores (T, K) of documents that need no images. At most PERCENT of their tokens keep theirs.

    It has four decimals, so that another device chooses the same.

    Raises:
        ValmError: there is nothing to choose from.
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
    # down to a number that the last one to be kept reaches, or up to one that the last one to be cut does not
    steps = np.floor(best[few] * 1e4) if questions is not None else np.floor(best[-few - 1] * 1e4) + 1
    return float(steps / 1e4)
