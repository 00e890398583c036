"""Controls of a training: the same tokens in the same order, with other images.

The effect of images is the difference from a twin with the same data, order, seed and steps:

- `WithoutImages`, "text": the effect of text alone (K = 0, the baseline GPT-2*). Also the data of a blind model, whose
  `BlindRetriever` makes each token's own retrieval query its one image (Blind-VaLM, Ontalvilla et al. 2024).
- `WithRandomImages`, "random": the effect of more parameters and of any images.
- `ShuffledImages`, "shuffled": the same, with each of the corpus' images as often as the corpus has it.

Each wraps whole documents (as `Collator` takes them), before they are cut into blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from valm.errors import ValmError
from valm.training.blocks import document_lengths

TWINS = ("text", "random", "blind", "shuffled")


class Twin(Dataset[dict[str, Any]]):
    """Base class: `documents` with other images, or none."""

    def __init__(self, documents: Sequence[dict[str, Any]]):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def lengths(self) -> np.ndarray:
        """Tokens of each document, (documents,) int64."""
        return document_lengths(self.documents)


class WithoutImages(Twin):
    """The tokens alone."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.documents[index]["input_ids"]}


class WithRandomImages(Twin):
    """Replaces each token's images by as many different random ones of a knowledge base.

    A document's images depend on the seed only, in every process.

    Args:
        images: how many the knowledge base has, at least K.
    """

    def __init__(self, documents: Sequence[dict[str, Any]], images: int, seed: int):
        super().__init__(documents)
        self.images = images
        self.seed = seed

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Document `index` with random images.

        Raises:
            ValmError: it has no image_ids.
        """
        document = self.documents[index]
        found = image_ids(document, index)  # (T, K)
        drawn = np.empty(found.shape, found.dtype)
        random = np.random.default_rng([self.seed, index])
        for column in range(drawn.shape[1]):
            # draws a rank among the numbers not drawn yet
            rank = random.integers(0, self.images - column, len(drawn))
            for earlier in np.sort(drawn[:, :column], axis=1).T:
                rank += rank >= earlier
            drawn[:, column] = rank
        drawn[found == -1] = -1
        return _with_images(document, drawn)


class ShuffledImages(Twin):
    """Each token that has images has those of another one of the corpus, by a permutation that moves each of them.

    The permutation is in memory, 8 bytes a token. All documents are read once to make it.

    Raises:
        ValmError: a document has no image_ids.
    """

    def __init__(self, documents: Sequence[dict[str, Any]], seed: int):
        super().__init__(documents)
        self._ends = np.cumsum(self.lengths())
        seeing = [(image_ids(documents[index], index) >= 0).any(-1) for index in range(len(documents))]
        cycle = np.random.default_rng(seed).permutation(np.flatnonzero(np.concatenate(seeing)))
        self._other = np.full(self._ends[-1], -1)  # by token; -1 has no images
        self._other[cycle] = np.roll(cycle, 1)  # a single cycle, so no token gets its own

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Document `index` with images of other tokens."""
        document = self.documents[index]
        end = self._ends[index]
        others = self._other[end - len(document["input_ids"]) : end]  # (T,) tokens of the corpus
        numbers = np.searchsorted(self._ends, others, side="right")  # (T,) the document of each
        images = np.full_like(image_ids(document, index), -1)
        for number in np.unique(numbers[others >= 0]):
            here = (numbers == number) & (others >= 0)
            found = image_ids(self.documents[number], number)
            images[here] = found[others[here] - self._ends[number]]  # counted from its end
        return _with_images(document, images)


def _with_images(document: dict[str, Any], images: np.ndarray) -> dict[str, Any]:
    """`document` with other images, whose scores nobody knows."""
    return {name: values for name, values in document.items() if name != "image_scores"} | {"image_ids": images}


def image_ids(document: dict[str, Any], index: int) -> np.ndarray:
    """The image ids (T, K) of document `index`.

    Raises:
        ValmError: it has none, or they cannot say -1, which is no image.
    """
    if "image_ids" not in document:
        raise ValmError(f"document {index} has no image_ids to be replaced: retrieve them first")
    found = np.asarray(document["image_ids"])
    if found.dtype.kind == "u":
        raise ValmError(
            f"the image_ids of document {index} are {found.dtype}, which has no -1 for no image: give int64"
        )
    return found


def twin(kind: str, documents: Sequence[dict[str, Any]], images: int, seed: int) -> Twin:
    """The data of a twin, one of TWINS; `images` and `seed` as in `WithRandomImages`.

    Raises:
        ValmError: `kind` is unknown.
    """
    if kind not in TWINS:
        raise ValmError(f"twin must be one of {', '.join(TWINS)}, got {kind!r}")
    if kind == "random":
        return WithRandomImages(documents, images, seed)
    if kind == "shuffled":
        return ShuffledImages(documents, seed)
    return WithoutImages(documents)
