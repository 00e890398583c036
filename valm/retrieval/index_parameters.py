"""How a knowledge base is indexed: the user's plan, the faiss index for it, and index.json next to the index."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from valm.errors import ValmError
from valm.options import check_fields, option
from valm.store.files import Count, Sha256, read_json
from valm.store.shards import check_seal
from valm_kernels.checksums import file_sha256
from valm_kernels.json_files import check_own

if TYPE_CHECKING:
    from valm.knowledge_base.store import ImageKnowledgeBase

INDEX_FILE = "index.faiss"
PARAMETERS_FILE = "index.json"
# Number of images from which an index is worthwhile.
EXACT_BELOW = 50_000
# Number of images, by device, from which codes of 64 bytes save memory. The other codes of this many images take 14 GB
# of a machine's memory, or 2.6 GB of a GPU's. On CPUs a search among 10 M images takes six times as long with 64 bytes
# (docs/results/scale.md).
PRODUCT_CODES_FROM = {"cpu": 100_000_000, "cuda": 10_000_000}
# Principal components by which candidates are found. On 1 M vectors of 768 numbers (benchmarks/valm/inputs.py), 16
# candidates per image contain 0.97 of the true nearest. Scanning all 768 numbers took three times as long.
PRINCIPAL = 256


@dataclass(frozen=True, kw_only=True)
class IndexPlan:
    """The target and the queries for which an index is tuned: options of `valm kb index`.

    Raises:
        ValmError: a field is out of its bounds.

    Example:
        >>> from valm.retrieval.index_parameters import IndexPlan
        >>> IndexPlan(target_recall=0.9, images=8)
        IndexPlan(target_recall=0.9, images=8, factory=None, queries=None, query='eot')
    """

    target_recall: float = option(
        "share of the -k images nearest to a query that the index must find, above 0 and at most 1", 0.95
    )
    images: int = option("images that each token sees", 4, short="-k", least=1)
    factory: str | None = option("faiss factory string, such as IVF4096,Flat or HNSW32 (default: by size)")
    queries: str | os.PathLike | None = option("text file that tunes the index (default: captions of the images)")
    query: str = option(
        "retrieval query: CLIP's feature of the text so far (eot), or its text tower's state at the token (state)",
        "eot",
        choices=["eot", "state"],
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.target_recall <= 1:
            raise ValmError(f"--target-recall is {self.target_recall}, expected above 0 and at most 1")


class IndexFile(TypedDict):
    """Name, size and SHA-256 of the index."""

    name: str
    bytes: Count
    sha256: Sha256


def file_entry(path: Path) -> IndexFile:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


@dataclass(frozen=True)
class IndexParameters:
    """The content of index.json without its checksum: how a knowledge base is indexed, and its recall.

    Attributes:
        factory: faiss's description of the index.
        trained_on: number of vectors that trained the index.
        search: faiss's search parameters, such as "nprobe=32" (cells of an inverted file to search) or "efSearch=64"
            (search width of an HNSW graph).
        candidates: number of candidates that are reranked exactly for each of the K results.
        recall: share of the true `k` nearest found, on `queries` queries that did not tune the index.
        target: the recall that was asked for.
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
        OSError: the file is a link out of the folder or not a regular file.
        ValmError: the parameters are damaged or stale.
    """
    path = kb.path / PARAMETERS_FILE
    if not os.path.lexists(path):
        return None
    check_own(path)
    values = read_json(path, "the index parameters", IndexParameters, remedy(kb))
    check_seal(values, path, remedy(kb))
    parameters = IndexParameters(**{field.name: values[field.name] for field in fields(IndexParameters)})
    if parameters.knowledge_base != kb.fingerprint:
        raise ValmError(f"the index in {kb.path} was made for another state of the knowledge base; {remedy(kb)}")
    return parameters


def remedy(kb: ImageKnowledgeBase) -> str:
    """What to do if the index is damaged or stale."""
    return f"make it again with `valm kb index {kb.path}`, or delete {PARAMETERS_FILE} to search exactly"


def choose_factory(count: int, dim: int, device: str = "cpu") -> str | None:
    """The faiss factory string for `count` vectors of width `dim`; None if exact search is as good.

    The index is an inverted file of about 4 sqrt(N) cells: with half as many, a search scans more vectors for the same
    recall. Its codes are 4 bits for each of PRINCIPAL numbers, in memory. faiss does not support these codes on GPUs,
    so there each number takes 8 bits. From PRODUCT_CODES_FROM vectors on, codes are 64 bytes a vector, as published,
    which faiss reads from a memory map.

    Args:
        device: "cpu" or "cuda", where faiss will search.
    """
    if count < EXACT_BELOW:
        return None
    cells = 1 << round(math.log2(4 * count**0.5))
    if count >= PRODUCT_CODES_FROM[device] and dim % 64 == 0:
        return f"OPQ64,IVF{cells},PQ64"
    reduced = f"PCA{PRINCIPAL}," if dim > PRINCIPAL else ""
    codes = "SQ8" if device == "cuda" else f"PQ{min(dim, PRINCIPAL)}x4fs"
    return f"{reduced}IVF{cells},{codes}"


def new_index(dim: int, factory: str) -> Any:
    """The untrained faiss index of vectors of width `dim`. Raises ValmError if faiss does not know the factory."""
    faiss = import_faiss()
    try:
        # the nearest unit vectors have the largest inner product, which no transform changes
        return faiss.index_factory(dim, factory, faiss.METRIC_L2)
    except RuntimeError as error:
        raise ValmError(f"faiss makes no index of {dim} dimensions from the factory string {factory!r}") from error


def stages(index: Any) -> tuple[list[Any], Any]:
    """The transforms of a faiss index, in order, and the index after them."""
    faiss = import_faiss()
    if not isinstance(index, faiss.IndexPreTransform):
        return [], index
    transforms = [faiss.downcast_VectorTransform(index.chain.at(number)) for number in range(index.chain.size())]
    return transforms, faiss.downcast_index(index.index)


def import_faiss() -> ModuleType:
    """The module faiss. Raises ImportError, which says how to install it."""
    try:
        with _openblas_for_amx():
            import faiss
    except ImportError as error:
        raise ImportError("an approximate index needs faiss: pip install -e '.[faiss]' or '.[gpu]'") from error
    return faiss


@contextmanager
def _openblas_for_amx() -> Iterator[None]:
    """Libraries of OpenBLAS that are loaded meanwhile use AVX-512 on a processor with AMX.

    faiss's wheels contain OpenBLAS 0.3.15, which does not know the newer of them (Emerald Rapids) and multiplies with
    SSE3 there: training and exact search take five times as long.
    """
    import torch  # not with this module, which a command imports for its options

    name = "OPENBLAS_CORETYPE"
    if name in os.environ or not torch.cpu._is_amx_tile_supported():
        yield
        return
    os.environ[name] = "SkylakeX"
    try:
        yield
    finally:
        del os.environ[name]
