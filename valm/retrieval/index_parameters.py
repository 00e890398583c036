"""The parameters of a knowledge base's faiss index, stored beside it in index.json."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.store.files import Count, Sha256, read_json
from valm.store.shards import check_seal

INDEX_FILE = "index.faiss"
PARAMETERS_FILE = "index.json"


class IndexFile(TypedDict):
    """Name, size and SHA-256 of the index."""

    name: str
    bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class IndexParameters:
    """The content of index.json, but its checksum: how a knowledge base is indexed, and with what recall.

    Attributes:
        factory: faiss's description of the index.
        trained_on: number of vectors it was trained on.
        search: faiss's search parameters, such as "nprobe=32" (cells of an inverted file to search) or "efSearch=64"
            (of an HNSW graph).
        candidates: how many are reranked exactly for each of the K results.
        recall: share of the true `k` nearest found, on `queries` queries that were not tuned on.
        target: the recall to be reached.
        asked: description of the queries.
        knowledge_base: fingerprint of the indexed knowledge base.
        file: name, size and SHA-256 of the index.
    """

    knowledge_base: str
    factory: str
    trained_on: Count
    search: Annotated[str, Field(pattern="^((nprobe|efSearch)=[1-9][0-9]{0,9})?$")]
    candidates: Annotated[int, Field(ge=1, le=1 << 16)]
    k: Annotated[int, Field(ge=1, le=1 << 16)]
    recall: Annotated[float, Field(ge=0, le=1)]
    target: Annotated[float, Field(ge=0, le=1)]
    queries: Count
    asked: str
    file: IndexFile

    def summary(self) -> str:
        """One line for display."""
        settings = ", ".join(filter(None, [self.factory, self.search, f"{self.candidates} candidates an image"]))
        size = f"{self.file['bytes'] / 1e6:,.0f} MB"
        return f"{settings}, {size}; recall@{self.k} {self.recall:.3f} on {self.queries:,} {self.asked}"


def index_parameters(kb: ImageKnowledgeBase) -> IndexParameters | None:
    """The parameters of the index of `kb`; None without an index.

    Raises:
        ValmError: they are damaged or stale.
    """
    path = kb.path / PARAMETERS_FILE
    if not os.path.lexists(path):
        return None
    values = read_json(path, "the index parameters", IndexParameters, remedy(kb))
    check_seal(values, path, remedy(kb))
    parameters = IndexParameters(**{field.name: values[field.name] for field in fields(IndexParameters)})
    if parameters.knowledge_base != kb.fingerprint:
        raise ValmError(f"the index in {kb.path} is of another state of the knowledge base; {remedy(kb)}")
    return parameters


def remedy(kb: ImageKnowledgeBase) -> str:
    """What to do if the index is damaged or stale."""
    return f"make it anew with `valm kb index {kb.path}`, or delete {PARAMETERS_FILE} to search exactly"
