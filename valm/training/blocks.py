"""Cuts documents of any length into blocks that a model can read."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from valm.errors import ValmError


def document_lengths(documents: Any) -> np.ndarray:
    """Tokens of each document, (documents,) int64: as `documents.lengths()` says, or by reading them all."""
    lengths = getattr(documents, "lengths", None)
    if lengths is not None:
        return lengths()
    return np.array([len(document["input_ids"]) for document in documents], dtype=np.int64)


class Blocks(Dataset[dict[str, Any]]):
    """`documents` (as `Collator` takes them), with those longer than `length` tokens cut into several blocks.

    A block is a dict like a document. Each later block begins with SOT again, so that it can be packed behind any
    other; its tokens do not see the text of earlier blocks, but have the images that were retrieved for the whole
    document.

    Args:
        documents: the documents.
        length: the most tokens of a block.
        sot: id of SOT.

    Raises:
        ValmError: a block of `length` tokens has no room beside SOT.
    """

    def __init__(self, documents: Any, length: int, sot: int):
        if length < 2:
            raise ValmError(f"a block must have at least 2 tokens, SOT and another, got a length of {length}")
        self.documents = documents
        self.length = length
        self.sot = sot
        lengths = document_lengths(documents)
        # SOT, and length - 1 other tokens in each block
        counts = np.maximum(1, -(-(lengths - 1) // (length - 1)))
        self._ends = np.cumsum(counts)
        self._lengths = np.full(self._ends[-1] if len(lengths) else 0, length)
        self._lengths[self._ends - 1] = lengths - (counts - 1) * (length - 1)

    def lengths(self) -> np.ndarray:
        """Tokens of each block, (blocks,) int64."""
        return self._lengths

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Block `index`.

        Raises:
            IndexError: the index is out of range.
            ValmError: a document to be cut does not begin with SOT.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"blocks go from 0 to {len(self) - 1}, got {index}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        document = self.documents[number]
        tokens = len(document["input_ids"])
        if tokens <= self.length:
            return document
        if document["input_ids"][0] != self.sot:
            raise ValmError(
                f"document {number} has {tokens} tokens, more than a block's {self.length}, and cannot be cut: it does "
                f"not begin with SOT"
            )
        first = int(self._ends[number - 1]) if number else 0
        begin = 1 + (index - first) * (self.length - 1)
        rows = np.r_[0, begin : min(begin + self.length - 1, tokens)]
        return {name: np.asarray(values)[rows] for name, values in document.items()}
