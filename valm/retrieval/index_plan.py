"""How a knowledge base is indexed: the options of `valm kb index`, which are the fields of `IndexPlan`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from valm.errors import ValmError
from valm.options import check_fields, option


@dataclass(frozen=True, kw_only=True)
class IndexPlan:
    """What an index is tuned to, and on which queries; its fields are options of `valm kb index`.

    Raises:
        ValmError: a field is out of its bounds.
    """

    target_recall: float = option(
        "share of the -k images nearest to a query that the index is tuned to find, above 0 and at most 1", 0.95
    )
    images: int = option("images a token sees", 4, short="-k", least=1)
    factory: str | None = option("faiss factory string, such as IVF4096,Flat or HNSW32 (default: by size)")
    queries: str | os.PathLike | None = option("text file to be tuned on (default: captions of the images)")
    query: str = option("kind of the retrieval query", "eot", choices=["eot", "state"])

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.target_recall <= 1:
            raise ValmError(f"--target-recall is {self.target_recall}, expected above 0 and at most 1")
