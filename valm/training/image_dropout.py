"""Trains on a share of the documents without their images, so that the model stays good without any."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from valm.training.blocks import document_lengths
from valm.training.twins import image_ids


class ImageDropout(Dataset[dict[str, Any]]):
    """`documents` for training, of which a share sees no image, in each pass another one.

    Number n is document n % len(documents) in pass n // len(documents), as a `TrainingOrder` with `passes` counts.
    Whether it sees its images depends on the seed, the pass and the document alone, in any batch and process.

    Args:
        documents: as `Collator` takes them, with image_ids.
        share: the probability that a document sees no image, from 0 to below 1.
    """

    def __init__(self, documents: Any, share: float, seed: int):
        self.documents = documents
        self.share = share
        self.seed = seed

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The document of this number.

        Raises:
            ValmError: it has no image_ids.
        """
        which_pass, index = divmod(number, len(self.documents))
        document = self.documents[index]
        if np.random.default_rng([self.seed, which_pass, index]).random() >= self.share:
            return document
        none: dict[str, Any] = {"image_ids": np.full_like(image_ids(document, index), -1)}
        if "image_scores" in document:
            none["image_scores"] = np.full_like(document["image_scores"], -np.inf)
        return document | none

    def lengths(self) -> np.ndarray:
        """Tokens of each document, (documents,) int64."""
        return document_lengths(self.documents)
