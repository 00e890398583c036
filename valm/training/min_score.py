"""Documents of which the tokens with weak images see none (`valm.retrieval.min_score`)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from valm.corpus.min_score import NO_SCORES
from valm.errors import ValmError
from valm.retrieval.min_score import cut
from valm.training.twins import Twin, image_ids

# Documents among which one image is looked for.
LOOKED_AT = 1000


class WithMinScore(Twin):
    """The tokens of `documents` whose scores are all below `min_score` have no images.

    The controls `WithRandomImages` and `ShuffledImages` go around this, so that they have as many images.
    """

    def __init__(self, documents: Any, min_score: float):
        super().__init__(documents)
        self.min_score = min_score

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Document `index`.

        Raises:
            ValmError: it has no image_scores, or its image_ids cannot say -1.
        """
        document = self.documents[index]
        if "image_scores" not in document:
            raise ValmError(f"document {index}, for a model with a min_score, {NO_SCORES}")
        scores = torch.from_numpy(document["image_scores"])
        ids, scores = cut(torch.from_numpy(image_ids(document, index)), scores, self.min_score)
        return document | {"image_ids": ids.numpy(), "image_scores": scores.numpy()}


def with_min_score(documents: Any, min_score: float | None) -> Any:
    """`documents` with this `min_score`, unless they have it already; None: without one.

    Raises:
        ValmError: they have another one, or no image_scores, or no length.
    """
    inner = documents
    while inner is not None and not isinstance(inner, WithMinScore):
        inner = getattr(inner, "documents", None)
    if inner is None:
        if min_score is None:
            return documents
        if not hasattr(documents, "__len__"):
            raise ValmError("a streamed dataset has no min_score: give documents that have a length")
        made = WithMinScore(documents, min_score)
        _warn_of_no_image(made)  # which also raises before anything is computed
        return made
    if inner.min_score != min_score:
        raise ValmError(f"the documents have the min_score {inner.min_score}, but the model's is {min_score}")
    return documents


def _warn_of_no_image(documents: WithMinScore) -> None:
    """Warns if no token of the first documents keeps an image."""
    highest = -np.inf
    count = min(len(documents), LOOKED_AT)
    for number in range(count):
        if (documents[number]["image_ids"] != -1).any():
            return
        highest = max(highest, documents.documents[number]["image_scores"].max(initial=-np.inf))
    if np.isfinite(highest):
        warnings.warn(
            f"at min_score {documents.min_score} no token of the first {count} documents sees an image: the highest "
            f"score is {highest:.3f}",
            stacklevel=4,
        )
