"""Documents on their way into a training: cut by a score, of a twin, held out, and in blocks that a model can read.

A document is a dict as `Collator` takes it. All here are views: a corpus stays on the disk.
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

# Makes a document of its number and the document.
Change = Callable[[int, dict[str, Any]], dict[str, Any]]
# Row and columns of each document in a batch.
Places = list[tuple[int, slice]]
# Documents among which one image is looked for.
LOOKED_AT = 1000


class Documents(Dataset[dict[str, Any]]):
    """`documents` of the given `numbers` (default: all), each as `change` makes it.

    Args:
        passes: a number from the end on is one of a later pass over the documents, as a `TrainingOrder` with `passes`
            counts them.
        min_score: below which `change` hides a token's images.
        of_images: (documents,) as `groups` has them; by default those of `documents`.
        of_length: as `lengths` has them; by default those of `documents`.
    """

    def __init__(
        self,
        documents: Any,
        change: Change | None = None,
        numbers: np.ndarray | None = None,
        *,
        passes: bool = False,
        min_score: float | None = None,
        of_images: np.ndarray | None = None,
        of_length: np.ndarray | None = None,
    ):
        self.documents, self.change, self.numbers = documents, change, numbers
        self.passes, self.min_score, self.of_images, self.of_length = passes, min_score, of_images, of_length

    def __len__(self) -> int:
        return len(self.documents) if self.numbers is None else len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self) and not self.passes:
            raise IndexError(f"documents go from 0 to {len(self) - 1}, got {index}")  # which ends a loop
        number = index if self.numbers is None else int(self.numbers[index])
        document = self.documents[number % len(self.documents)]
        return document if self.change is None else self.change(number, document)

    def lengths(self) -> np.ndarray:
        """Tokens of each document, (documents,) int64."""
        return self._of(document_lengths(self.documents)) if self.of_length is None else self.of_length

    def groups(self) -> np.ndarray:
        """(documents,) int64: those that are texts of one image have the same number, that of none has 0."""
        return self._of(document_groups(self.documents) if self.of_images is None else self.of_images)

    def _of(self, found: np.ndarray) -> np.ndarray:
        return found if self.numbers is None else found[self.numbers % len(found)]


def at_places(
    values: Sequence[Any], places: Places, shape: tuple[int, int], empty: Any, dtype: Any = None
) -> np.ndarray:
    """The values (T, ...) of documents at their places in a batch (B, L), as (B, L, ...); `empty` elsewhere."""
    first = np.asarray(values[0])
    batch = np.full((*shape, *first.shape[1:]), empty, dtype or first.dtype)
    for of_document, place in zip(values, places, strict=True):
        batch[place] = of_document
    return batch


def document_lengths(documents: Any) -> np.ndarray:
    """Tokens of each document, (documents,) int64: as `documents.lengths()` says, or by reading them all."""
    if hasattr(documents, "lengths"):
        return documents.lengths()
    return np.array([len(document["input_ids"]) for document in documents], dtype=np.int64)


def document_groups(documents: Any) -> np.ndarray:
    """(documents,) int64, as `documents.groups()` says; 0 where it says nothing."""
    return documents.groups() if hasattr(documents, "groups") else np.zeros(len(documents), np.int64)


def views(documents: Any) -> Iterator[Any]:
    """`documents`, and what they are views of: of this module, or PyTorch's `Subset`."""
    while documents is not None:
        yield documents
        documents = getattr(documents, "documents", getattr(documents, "dataset", None))


def hold_out(documents: Any, fraction: float, seed: int) -> tuple[Documents, Documents]:
    """Splits `documents` into those to train on and those held out, at random by `seed`, at least one of each.

    The texts of one image stay together: its other captions would tell what the one that is held out says.

    Raises:
        ValmError: the fraction is not between 0 and 1, or there are not two documents, or all are texts of one image.
    """
    if not 0 < fraction < 1:
        raise ValmError(f"the fraction to hold out must be above 0 and below 1, got {fraction}")
    count = len(documents)
    groups = document_groups(documents)
    groups = np.where(groups == 0, -1 - np.arange(count), groups)  # without an image each is by itself
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    if len(first) < 2:
        of = " of more than one image" if count > 1 else ""
        raise ValmError(f"to hold documents out there must be at least 2{of}, got {count}: give a corpus of more")
    group = np.argsort(np.argsort(first))[group]  # numbered as they come
    drawn = np.argsort(np.random.default_rng(seed).permutation(len(first)))[group]  # when each document's is drawn
    enough = int(np.searchsorted(np.cumsum(np.bincount(drawn)), max(1, round(fraction * count))))
    held = drawn <= min(enough, len(first) - 2)
    return Documents(documents, numbers=np.flatnonzero(~held)), Documents(documents, numbers=np.flatnonzero(held))


def with_min_score(documents: Any, min_score: float | None) -> Any:
    """`documents`, whose tokens see no image where all their scores are below `min_score`, unless they are cut so
    already; None: as they are. Twins go around this, so that they have as many images.

    Raises:
        ValmError: they have another one, no length, or a document no image_scores.
    """
    found = next((score for view in views(documents) if (score := getattr(view, "min_score", None)) is not None), None)
    if found is not None and found != min_score:
        raise ValmError(f"the documents have the min_score {found}, but the model's is {min_score}")
    if min_score is None or found is not None:
        return documents
    if not hasattr(documents, "__len__"):
        raise ValmError("a streamed dataset has no min_score: give documents that have a length")
    made = Documents(documents, partial(_cut, min_score), min_score=min_score)
    _warn_of_no_image(made)  # which also raises before anything is computed
    return made


def with_image_dropout(documents: Any, share: float, seed: int) -> Documents:
    """`documents` for training, of which a share sees no image, in each pass another one, so that the model stays good
    without any. Which ones depends on the seed, the pass and the document alone, in any batch and process."""
    return Documents(documents, partial(_drop, share, seed, len(documents)), passes=True)


def twin(kind: str, documents: Any, images: int, seed: int) -> Documents:
    """The data of a control of a training, of which the effect of images is the difference: the same tokens in the same
    order, with other images or none. They are those of whole documents, before these are cut into blocks.

    - "text": the tokens alone (K = 0, the baseline GPT-2*).
    - "blind": the same; a `BlindRetriever` makes each token's own retrieval query its one image (Blind-VaLM, Ontalvilla
      et al. 2024).
    - "random": as many different random images of a knowledge base of `images`, at least K: the effect of more
      parameters and of any images.
    - "shuffled": those of another token of the corpus, by one permutation that moves each token that has any. It is in
      memory, 8 bytes a token, and made by reading all documents once.

    Raises:
        ValmError: `kind` is unknown.
    """
    if kind not in TWINS:
        raise ValmError(f"twin must be one of {', '.join(TWINS)}, got {kind!r}")
    if kind == "random":
        return Documents(documents, partial(_random, images, seed))
    return Documents(documents, _Shuffled(documents, seed) if kind == "shuffled" else _tokens_alone)


def evened(documents: Any, multiple: int) -> Documents:
    """`documents`, padded to a multiple of `multiple` with documents of one token, which add no loss.

    accelerate would instead send some documents to two processes, and their losses would count twice.
    """
    numbers = np.arange(-(-len(documents) // multiple) * multiple)
    return Documents(documents, partial(_one_token, len(documents)), numbers)


def blocks(documents: Any, length: int, sot: int) -> Documents:
    """`documents` (as `Collator` takes them), with those longer than `length` tokens cut into several blocks.

    A block is a dict like a document. Each later block begins with SOT again, so that it can be packed behind any
    other; its tokens do not see the text of earlier blocks, but have the images that were retrieved for the whole
    document.

    Args:
        length: the most tokens of a block.
        sot: id of SOT. Reading a block of a document that does not begin with it raises ValmError.

    Raises:
        ValmError: a block of `length` tokens has no room beside SOT.
    """
    if length < 2:
        raise ValmError(f"a block must have at least 2 tokens, SOT and another, got a length of {length}")
    lengths = document_lengths(documents)
    counts = np.maximum(1, -(-(lengths - 1) // (length - 1)))  # SOT, and length - 1 other tokens in each block
    owner = np.repeat(np.arange(len(lengths)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)  # among the blocks of its document
    of_block = np.minimum(length, lengths[owner] - rank * (length - 1))
    cut_up = partial(_block, len(lengths), length, sot)
    return Documents(documents, cut_up, owner + rank * len(lengths), of_length=of_block)


# The changes are of the module, so that a data loader can send them to its workers.


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
            f"document {number}, for a model with a min_score, has no retrieval scores: retrieve it again, "
            "`valm retrieve CORPUS --kb KB --out FOLDER` writes them"
        )
    scores = torch.from_numpy(document["image_scores"])
    ids, scores = cut(torch.from_numpy(document["image_ids"]), scores, min_score)
    return document | {"image_ids": ids.numpy(), "image_scores": scores.numpy()}


def _drop(share: float, seed: int, size: int, number: int, document: dict[str, Any]) -> dict[str, Any]:
    if np.random.default_rng([seed, *divmod(number, size)]).random() >= share:
        return document
    none: dict[str, Any] = {"image_ids": np.full_like(document["image_ids"], -1)}
    if "image_scores" in document:
        none["image_scores"] = np.full_like(document["image_scores"], -np.inf)
    return document | none


def _random(images: int, seed: int, number: int, document: dict[str, Any]) -> dict[str, Any]:
    found = document["image_ids"]  # (T, K)
    drawn = np.empty(found.shape, found.dtype)
    random = np.random.default_rng([seed, number])
    for column in range(drawn.shape[1]):
        # draws a rank among the numbers not drawn yet
        rank = random.integers(0, images - column, len(drawn))
        for earlier in np.sort(drawn[:, :column], axis=1).T:
            rank += rank >= earlier
        drawn[:, column] = rank
    drawn[found == -1] = -1
    return _with_images(document, drawn)


class _Shuffled:
    """The change of the twin "shuffled"."""

    def __init__(self, documents: Any, seed: int):
        self.documents = documents
        self._ends = np.cumsum(document_lengths(documents))
        seeing = [(documents[number]["image_ids"] >= 0).any(-1) for number in range(len(documents))]
        cycle = np.random.default_rng(seed).permutation(np.flatnonzero(np.concatenate(seeing)))
        self._other = np.full(self._ends[-1], -1)  # by token; -1 has no images
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
    """`document` with other images, whose scores nobody knows."""
    return {name: values for name, values in document.items() if name != "image_scores"} | {"image_ids": images}


def _warn_of_no_image(documents: Documents) -> None:
    """Warns if no token of the first documents, which are cut by a min_score, keeps an image."""
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
