"""Prepares documents for a training: score threshold, images of a control, held-out documents, blocks.

A document is a dict as `Collator` takes it. All functions return views: a corpus stays on the disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from valm.errors import ValmError
from valm.retrieval.min_score import cut
from valm.training.plan import TWINS

# Changes a document, given its number and the document.
Change = Callable[[int, dict[str, Any]], dict[str, Any]]
# Row and columns of each document in a batch.
Places = list[tuple[int, slice]]
# How many documents are searched for an image.
LOOKED_AT = 1000


class DocumentView(Dataset[dict[str, Any]]):
    """A view of `documents` with the given `numbers` (default: all), each changed by `change`.

    Args:
        min_score: the score threshold below which `change` hides a token's images.
        of_images: (documents,) the result of `groups`; by default from `documents`.
        of_length: (documents,) the result of `lengths`; by default from `documents`.
    """

    def __init__(
        self,
        documents: Any,
        change: Change | None = None,
        numbers: np.ndarray | None = None,
        *,
        min_score: float | None = None,
        of_images: np.ndarray | None = None,
        of_length: np.ndarray | None = None,
    ):
        self.documents, self.change, self.numbers = documents, change, numbers
        self.min_score, self.of_images, self.of_length = min_score, of_images, of_length

    def __len__(self) -> int:
        return len(self.documents) if self.numbers is None else len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(f"documents go from 0 to {len(self) - 1}, got {index}")  # ends a for loop
        number = index if self.numbers is None else int(self.numbers[index])
        document = self.documents[number % len(self.documents)]
        return document if self.change is None else self.change(number, document)

    def lengths(self) -> np.ndarray:
        """Tokens of each document, (documents,) int64."""
        return self._of(document_lengths(self.documents)) if self.of_length is None else self.of_length

    def groups(self) -> np.ndarray:
        """(documents,) int64: texts of one image share a number; a text without an image gets 0."""
        return self._of(document_groups(self.documents) if self.of_images is None else self.of_images)

    def _of(self, found: np.ndarray) -> np.ndarray:
        return found if self.numbers is None else found[self.numbers % len(found)]


def at_places(
    values: Sequence[Any], places: Places, shape: tuple[int, int], empty: Any, dtype: Any = None
) -> np.ndarray:
    """The values (T, ...) of documents at their places in a batch: (B, L, ...), `empty` elsewhere."""
    first = np.asarray(values[0])
    batch = np.full((*shape, *first.shape[1:]), empty, dtype or first.dtype)
    for of_document, place in zip(values, places, strict=True):
        batch[place] = of_document
    return batch


def document_lengths(documents: Any) -> np.ndarray:
    """Tokens of each document, (documents,) int64: from `documents.lengths()`, or by reading all documents."""
    if hasattr(documents, "lengths"):
        return documents.lengths()
    return np.array([len(document["input_ids"]) for document in documents], dtype=np.int64)


def document_groups(documents: Any) -> np.ndarray:
    """(documents,) int64 from `documents.groups()`; 0 if there is no such method."""
    return documents.groups() if hasattr(documents, "groups") else np.zeros(len(documents), np.int64)


def views(documents: Any) -> Iterator[Any]:
    """`documents` and what they are a view of, through views of this module and PyTorch's `Subset`."""
    while documents is not None:
        yield documents
        documents = getattr(documents, "documents", getattr(documents, "dataset", None))


def hold_out(documents: Any, fraction: float, seed: int) -> tuple[DocumentView, DocumentView]:
    """Splits `documents` at random by `seed` into training and held-out documents, at least one of each.

    The texts of one image stay together, because its other captions would reveal the held-out caption.

    Raises:
        ValmError: the fraction is not between 0 and 1, there are fewer than two documents, or all are texts of one
            image.
    """
    if not 0 < fraction < 1:
        raise ValmError(f"the fraction to hold out must be above 0 and below 1, got {fraction}")
    count = len(documents)
    groups = document_groups(documents)
    groups = np.where(groups == 0, -1 - np.arange(count), groups)  # a text without an image is a group
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    if len(first) < 2:
        of = " of more than one image" if count > 1 else ""
        raise ValmError(f"to hold documents out, there must be at least 2{of}, got {count}: give a larger corpus")
    group = np.argsort(np.argsort(first))[group]  # numbered in order of appearance
    drawn = np.argsort(np.random.default_rng(seed).permutation(len(first)))[group]  # rank of each document's group
    enough = int(np.searchsorted(np.cumsum(np.bincount(drawn)), max(1, round(fraction * count))))
    held = drawn <= min(enough, len(first) - 2)
    return DocumentView(documents, numbers=np.flatnonzero(~held)), DocumentView(documents, numbers=np.flatnonzero(held))


def with_min_score(documents: Any, min_score: float | None) -> Any:
    """`documents`, whose tokens see no image if all their scores are below `min_score`. Returned unchanged if min_score
    is None or already applied. Controls are made from the result, so that they see as many images. Raises ValmError if
    the documents have another min_score or no length, or a document lacks image_scores."""
    found = next((score for view in views(documents) if (score := getattr(view, "min_score", None)) is not None), None)
    if found is not None and found != min_score:
        raise ValmError(f"the documents have the min_score {found}, but the model's is {min_score}")
    if min_score is None or found is not None:
        return documents
    if not hasattr(documents, "__len__"):
        raise ValmError("min_score cannot be applied to a streamed dataset: give documents with a length")
    made = DocumentView(documents, partial(_cut, min_score), min_score=min_score)
    _warn_of_no_image(made)  # raises, too, before anything is computed
    return made


def twin(kind: str, documents: Any, images: int, seed: int) -> DocumentView:
    """The data of a control: the same tokens in the same order, with other images or none.

    The difference between model and control is the effect of the images. Apply it before `blocks`.

    - "text": no images (K = 0): the text-only baseline, GPT-2*.
    - "blind": no images; a `BlindRetriever` later replaces each token's image with its retrieval query (Blind-VaLM,
      Ontalvilla et al. 2024).
    - "random": each token's images are replaced by different random images of the `images` in the knowledge base. The
      control shows the effect of more parameters and of any images.
    - "shuffled": the images of another token of the corpus, by a permutation that moves each token with images. The
      permutation takes 8 bytes a token and reads all documents once.

    Raises:
        ValmError: `kind` is unknown.
    """
    if kind not in TWINS:
        raise ValmError(f"twin must be one of {', '.join(TWINS)}, got {kind!r}")
    if kind == "random":
        return DocumentView(documents, partial(_random, images, seed))
    return DocumentView(documents, _Shuffled(documents, seed) if kind == "shuffled" else _tokens_alone)


def evened(documents: Any, multiple: int) -> DocumentView:
    """`documents`, padded to a multiple of `multiple` with documents of one token, which add no loss.

    Otherwise accelerate would send some documents to two processes and count their losses twice.
    """
    numbers = np.arange(-(-len(documents) // multiple) * multiple)
    return DocumentView(documents, partial(_one_token, len(documents)), numbers)


def blocks(documents: Any, length: int, sot: int) -> DocumentView:
    """Cuts `documents` longer than `length` tokens into blocks, which are documents too.

    Each block begins with SOT, so that it can be packed after any other. Its tokens do not see the text of earlier
    blocks, but keep the images that were retrieved for the whole document.

    Args:
        length: maximum number of tokens in a block.
        sot: id of SOT. Reading a block of a document that does not begin with SOT raises ValmError.

    Raises:
        ValmError: `length` is below 2.
    """
    if length < 2:
        raise ValmError(f"a block must contain at least 2 tokens, SOT and another, got a length of {length}")
    lengths = document_lengths(documents)
    counts = np.maximum(1, -(-(lengths - 1) // (length - 1)))  # SOT and length - 1 other tokens a block
    owner = np.repeat(np.arange(len(lengths)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)  # among the blocks of its document
    of_block = np.minimum(length, lengths[owner] - rank * (length - 1))
    cut_up = partial(_block, len(lengths), length, sot)
    return DocumentView(documents, cut_up, owner + rank * len(lengths), of_length=of_block)


# The changes are functions of the module, so that a data loader can send them to its workers.


def _tokens_alone(number: int, document: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": document["input_ids"]}


def _one_token(count: int, number: int, document: dict[str, Any]) -> dict[str, Any]:
    return document if number < count else {name: values[:1] for name, values in document.items()}


def _block(count: int, length: int, sot: int, number: int, document: dict[str, Any]) -> dict[str, Any]:
    tokens = len(document["input_ids"])
    if tokens <= length:
        return document
    rank, of = divmod(number, count)
    if document["input_ids"][0] != sot:
        raise ValmError(
            f"document {of} has {tokens} tokens, more than a block's {length}, and cannot be cut: it does not begin "
            "with SOT"
        )
    begin = 1 + rank * (length - 1)
    rows = np.r_[0, begin : min(begin + length - 1, tokens)]
    return {name: np.asarray(values)[rows] for name, values in document.items()}


def _cut(min_score: float, number: int, document: dict[str, Any]) -> dict[str, Any]:
    if "image_scores" not in document:
        raise ValmError(
            f"document {number} contains no retrieval scores, which a model with a min_score needs: retrieve the "
            "corpus again with `valm retrieve CORPUS --kb KB --out FOLDER`"
        )
    scores = torch.from_numpy(document["image_scores"])
    ids, scores = cut(torch.from_numpy(document["image_ids"]), scores, min_score)
    return document | {"image_ids": ids.numpy(), "image_scores": scores.numpy()}


def _random(images: int, seed: int, number: int, document: dict[str, Any]) -> dict[str, Any]:
    found = document["image_ids"]  # (T, K)
    drawn = np.empty(found.shape, found.dtype)
    random = np.random.default_rng([seed, number])
    for column in range(drawn.shape[1]):
        # draws a rank among the remaining numbers
        rank = random.integers(0, images - column, len(drawn))
        for earlier in np.sort(drawn[:, :column], axis=1).T:
            rank += rank >= earlier
        drawn[:, column] = rank
    drawn[found == -1] = -1
    return _with_images(document, drawn)


class _Shuffled:
    """The change of the control "shuffled"."""

    def __init__(self, documents: Any, seed: int):
        self.documents = documents
        self._ends = np.cumsum(document_lengths(documents))
        seeing = [(documents[number]["image_ids"] >= 0).any(-1) for number in range(len(documents))]
        cycle = np.random.default_rng(seed).permutation(np.flatnonzero(np.concatenate(seeing)))
        self._other = np.full(self._ends[-1], -1)  # by token; -1 = no images
        self._other[cycle] = np.roll(cycle, 1)  # a single cycle, so no token gets its own

    def __call__(self, number: int, document: dict[str, Any]) -> dict[str, Any]:
        end = self._ends[number]
        others = self._other[end - len(document["input_ids"]) : end]  # (T,) tokens of the corpus
        owners = np.searchsorted(self._ends, others, side="right")  # (T,) the document of each
        images = np.full_like(document["image_ids"], -1)
        for owner in np.unique(owners[others >= 0]):
            here = (owners == owner) & (others >= 0)
            images[here] = self.documents[owner]["image_ids"][others[here] - self._ends[owner]]  # from its end
        return _with_images(document, images)


def _with_images(document: dict[str, Any], images: np.ndarray) -> dict[str, Any]:
    """`document` with other images, and without scores, which are unknown."""
    return {name: values for name, values in document.items() if name != "image_scores"} | {"image_ids": images}


def _warn_of_no_image(documents: DocumentView) -> None:
    """Warns if no token of the first documents reaches the score threshold."""
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
