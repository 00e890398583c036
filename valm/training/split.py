"""Holds documents out of a training, for evaluation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from valm.errors import ValmError
from valm.training.blocks import Blocks, document_lengths


class Selected(Dataset[dict[str, Any]]):
    """The subset of `documents` with the given numbers."""

    def __init__(self, documents: Any, numbers: np.ndarray):
        self.documents = documents
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.documents[int(self.numbers[index])]

    def lengths(self) -> np.ndarray:
        """Tokens of each document, (documents,) int64."""
        return document_lengths(self.documents)[self.numbers]


def hold_out(documents: Any, fraction: float, seed: int) -> tuple[Selected, Selected]:
    """Splits `documents` into those to train on and those held out, at random by `seed`, at least one of each.

    Raises:
        ValmError: the fraction is not between 0 and 1, or there are not two documents.
        TypeError: `documents` are blocks, of which one document may have several.
    """
    if isinstance(documents, Blocks):
        raise TypeError(
            "hold_out takes documents, got Blocks: hold documents out first, then cut both parts into blocks"
        )
    if not 0 < fraction < 1:
        raise ValmError(f"the fraction to hold out must be above 0 and below 1, got {fraction}")
    count = len(documents)
    if count < 2:
        raise ValmError(f"to hold documents out there must be at least 2, got {count}: give a corpus of more documents")
    held = min(count - 1, max(1, round(fraction * count)))
    drawn = np.random.default_rng(seed).permutation(count)
    return Selected(documents, np.sort(drawn[held:])), Selected(documents, np.sort(drawn[:held]))


def validation_of(given: str | os.PathLike | float) -> float | Path:
    """The fraction or the path that `validation` of a plan means; a text may be either."""
    if isinstance(given, float):
        return given
    try:
        return float(given) if isinstance(given, str) else Path(given)
    except ValueError:
        return Path(given)
