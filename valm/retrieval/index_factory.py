"""faiss itself, and its factory strings: which kind of index suits a knowledge base."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from valm.errors import ValmError

# Number of images from which an index is worthwhile.
EXACT_BELOW = 50_000
# Number of images, by device, from which codes of 64 bytes are taken to save memory: otherwise the codes of so many
# take 14 GB of the machine's, or 2.6 GB of a GPU's. On CPUs a search among 10 M takes six times as long through them
# (docs/results/scale.md).
PRODUCT_CODES_FROM = {"cpu": 100_000_000, "cuda": 10_000_000}
# Principal components by which candidates are found. On 1 M vectors of 768 numbers (benchmarks/valm/inputs.py) 16
# candidates per image then contain 0.97 of the true nearest; scanning all 768 numbers took three times as long.
PRINCIPAL = 256


def choose_factory(count: int, dim: int, device: str = "cpu") -> str | None:
    """The faiss factory string for `count` vectors of width `dim`; None if exact search is as good.

    An inverted file of about 4 sqrt(N) cells with 4 bits for each of PRINCIPAL numbers, in memory; for very many
    vectors (PRODUCT_CODES_FROM) 64 bytes a vector, as published, which faiss reads from a memory map. With half as many
    cells a search has to scan more vectors for the same recall. GPUs of faiss hold no such codes of 4 bits, so there
    each number has 8.

    Args:
        device: "cpu" or "cuda", where faiss is to search.
    """
    if count < EXACT_BELOW:
        return None
    cells = 1 << round(np.log2(4 * count**0.5))
    if count >= PRODUCT_CODES_FROM[device] and dim % 64 == 0:
        return f"OPQ64,IVF{cells},PQ64"
    reduced = f"PCA{PRINCIPAL}," if dim > PRINCIPAL else ""
    codes = "SQ8" if device == "cuda" else f"PQ{min(dim, PRINCIPAL)}x4fs"
    return f"{reduced}IVF{cells},{codes}"


def new_index(dim: int, factory: str) -> Any:
    """The untrained faiss index of vectors of width `dim` from a factory string.

    Raises:
        ValmError: faiss does not know the string.
    """
    faiss = import_faiss()
    try:
        # for unit vectors the nearest have the largest inner product, and no transform changes that
        return faiss.index_factory(dim, factory, faiss.METRIC_L2)
    except RuntimeError as error:
        raise ValmError(f"faiss makes no index of {dim} dimensions from the factory string {factory!r}") from error


def stages(index: Any) -> tuple[list[Any], Any]:
    """The transforms of a faiss index, in order, and the index behind them."""
    faiss = import_faiss()
    if not isinstance(index, faiss.IndexPreTransform):
        return [], index
    transforms = [faiss.downcast_VectorTransform(index.chain.at(number)) for number in range(index.chain.size())]
    return transforms, faiss.downcast_index(index.index)


def import_faiss() -> ModuleType:
    """The module faiss.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("an approximate index needs faiss: pip install -e '.[faiss]' or '.[gpu]'") from error
    return faiss
