"""Makes the faiss index of a knowledge base: fills it, tunes it on real queries, and measures its recall.

Tuning chooses how much of the index is searched and how many candidates are reranked exactly. Among the settings that
reach the target recall it takes the setting that reads the fewest bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from valm.clip.tokenizer import padded, prompt_ids
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.progress import progress_bar
from valm.retrieval.context import ContextEncoder
from valm.retrieval.faiss_gpu import faiss_device
from valm.retrieval.faiss_index import FaissIndex, read_index, remove_index
from valm.retrieval.index_filling import filled_index, partial_file, remove_partials, training_rows
from valm.retrieval.index_parameters import (
    INDEX_FILE,
    PARAMETERS_FILE,
    IndexParameters,
    IndexPlan,
    choose_factory,
    file_entry,
    import_faiss,
    new_index,
    stages,
)
from valm.retrieval.retriever import check_k
from valm.store.files import WAIT_SECONDS, read_text, write_json
from valm.store.folders import link
from valm.store.shards import sealed
from valm.text import one_line, split_lines
from valm_kernels import ip_topk, merge_topk
from valm_kernels.atomic_files import folder_lock, remove_leftovers, temporary_file

# Queries for tuning; as many again measure recall.
QUERIES = 1024
# Numbers of candidates per image that tuning tries.
CANDIDATES = (32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
# Tuning ends at a search with this many times the work of the best one: fewer candidates need a longer search.
GIVE_UP = 1.5
# Cost of a randomly read vector byte, in bytes of sequentially scanned codes: 1.26 and 4.5 GB/s, for 400,000 vectors of
# 768 and 256 numbers on two cores.
RANDOM_READ = 4
TEXTS_AT_ONCE = 64
# Queries of one text are similar: few are taken from each, so that both halves need the same search.
TOKENS_PER_TEXT = 8
# Number of images whose captions serve as queries if no other text is given.
CAPTIONED = 1024


def index_knowledge_base(
    kb: ImageKnowledgeBase,
    plan: IndexPlan,
    *,
    clip: str | os.PathLike | None = None,
    allow_download: bool = False,
    device: torch.device | str = "cpu",
) -> FaissIndex | None:
    """Indexes `kb` as `plan` says, and writes the index into its folder.

    Args:
        plan: the target recall, and the queries that tune the index.
        clip, allow_download: as for `ImageKnowledgeBase.load_clip`.
        device: where queries are encoded. faiss searches there too, if it supports GPUs.

    Returns:
        The index; or None, without an index, if exact search is as good and the plan names no factory.

    Raises:
        ValmError: as `build_index`, or there is no text for tuning.
        ImportError: faiss is not installed.

    Example:
        >>> from valm.retrieval.index_parameters import IndexPlan
        >>> from valm.retrieval.index_tuning import index_knowledge_base
        >>> kb = valm.ImageKnowledgeBase.open("kb")
        >>> print(index_knowledge_base(kb, IndexPlan(images=2)))  # for 3 images exact search is as good
        None
    """
    check_k(plan.images, kb)
    if plan.factory is None and choose_factory(len(kb), kb.dim) is None:
        remove_index(kb)
        remove_partials(kb)
        return None
    searched_on = faiss_device(device)
    factory = plan.factory or choose_factory(len(kb), kb.dim, searched_on.type)
    assert factory is not None  # the CPU has one
    new_index(kb.dim, factory)  # finds a misspelt factory before queries are encoded
    texts = captions(kb) if plan.queries is None else split_lines(read_text(plan.queries))
    source = "captions of the images" if plan.queries is None else Path(plan.queries).name
    encoder = ContextEncoder(kb.load_clip(clip, allow_download=allow_download).to(device), query=plan.query)
    return build_index(
        kb,
        context_queries(encoder, texts),
        factory,
        k=plan.images,
        target_recall=plan.target_recall,
        asked=f"{plan.query} queries at the tokens of {source}",
        device=searched_on,
    )


def build_index(
    kb: ImageKnowledgeBase,
    queries: Tensor,
    factory: str,
    *,
    k: int = 4,
    target_recall: float = 0.95,
    asked: str = "queries",
    seed: int = 0,
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> FaissIndex:
    """Indexes `kb` and writes the index into its folder. An old index stays until the new index is complete.

    Memory holds the index (up to twice while vectors are added), its training vectors (at most
    `index_filling.MAX_TRAIN`, in float32, up to 2.5 times) and the largest shard. The disk holds an index of packed
    codes ("PQ64x4fs") twice until it is written. A build that was killed or missed the target continues if you call it
    again with the same factory and seed (`index_filling`).

    Args:
        queries: (Q, E) of the kind that will be searched (`context_queries`), with different texts in the two halves:
            the first half tunes the index, the second measures its recall against an exact search.
        target_recall: share of the true `k` nearest to find, in the first half with a margin (`_margin`). Settings that
            miss it in the second half are rejected too.
        factory: a faiss factory string; `choose_factory` returns one for each size and device. Tuning sets the cells to
            search of an inverted file ("IVF4096,Flat", "OPQ64,IVF65536,PQ64") or the search width of a graph
            ("HNSW32").
        asked: description of the queries, for display.
        device: where the index is tuned, and where the returned index searches, as for `FaissIndex`.

    Raises:
        ValmError: faiss does not know the factory, no setting reaches the target, or a vector is not finite.
        TimeoutError: another process indexes `kb`.
        ImportError: faiss is not installed.
    """
    queries = queries.reshape(-1, kb.dim).float().cpu()
    check_k(k, kb)
    if len(queries) < 2:
        raise ValmError(f"an index needs at least 2 queries, to tune and to measure it, got {len(queries)}")
    trained_on = training_rows(kb, new_index(kb.dim, factory))
    file = kb.path / INDEX_FILE
    with folder_lock(kb.path, WAIT_SECONDS), temporary_file(file) as packed:
        remove_leftovers(kb.path)
        partial = partial_file(kb, factory, seed)
        try:
            whole = filled_index(kb, factory, partial, packed, seed=seed, device=device, progress=progress)
        except RuntimeError as error:  # for example IDMap, which takes no vectors without ids
            reason = one_line(str(error))
            raise ValmError(f"faiss cannot fill an index of the factory string {factory!r}: {reason}") from error
        untuned = IndexParameters(
            knowledge_base=kb.fingerprint,
            factory=factory,
            trained_on=trained_on,
            search="",
            candidates=1,
            k=k,
            recall=0.0,
            target=target_recall,
            queries=len(queries) - len(queries) // 2,
            asked=asked,
            file={**file_entry(whole), "name": INDEX_FILE},
        )
        parameters = _tuned(kb, read_index(whole), untuned, queries, device, progress)
        # from here until the new parameters are written, the knowledge base has no index
        (kb.path / PARAMETERS_FILE).unlink(missing_ok=True)
        link(whole, file)  # linked, not moved: if this is killed, the next build still finds it whole
        write_json(kb.path / PARAMETERS_FILE, sealed(asdict(parameters)))
        partial.unlink()
        return FaissIndex.open(kb, device)


def captions(kb: ImageKnowledgeBase, images: int = CAPTIONED, seed: int = 0) -> list[str]:
    """The captions of some random images: a text per image, a caption a line. Raises ValmError if there are none."""
    ids = np.random.default_rng(seed).choice(len(kb), min(images, len(kb)), replace=False)
    found = [text for id in np.sort(ids).tolist() if (text := kb.item(id).caption.strip())]
    if not found:
        raise ValmError(f"the images of {kb.path} have no captions to make queries from: give a text file as --queries")
    return found


def context_queries(encoder: ContextEncoder, texts: Sequence[str], count: int = 2 * QUERIES, seed: int = 0) -> Tensor:
    """Up to `count` queries (Q, E) at random tokens of random `texts`, at about TOKENS_PER_TEXT tokens of each text.

    Each line of a text is read separately, and its first token has no query. The two halves of the queries come from
    different texts, as `build_index` needs.

    Raises:
        ValmError: there are fewer than two texts.
    """
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValmError("there is no text to make queries from: give at least two lines")
    if len(texts) == 1:
        raise ValmError("there is one text to make queries from, expected two or more: for tuning and for measuring")
    random = np.random.default_rng(seed)
    order = [texts[row] for row in random.permutation(len(texts))]
    half = len(order) // 2
    halves = [_queries(encoder, some, count // 2, random) for some in (order[:half], order[half:])]
    return torch.cat([queries[: min(map(len, halves))] for queries in halves])


def _queries(encoder: ContextEncoder, texts: list[str], count: int, random: np.random.Generator) -> Tensor:
    """The first `count` queries (Q, E), or fewer, at random tokens of `texts`."""
    queries: list[Tensor] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[start : start + TEXTS_AT_ONCE]
        lines = [line for text in some for line in split_lines(text) if line.strip()]
        ids, mask = padded([prompt_ids(encoder.tokenizer, line) for line in lines])
        found = encoder(ids, mask)
        found = found[found.any(-1)]  # without padding and first tokens, which are not searched for
        drawn = random.permutation(len(found))[: TOKENS_PER_TEXT * len(some)]
        queries.append(found[np.sort(drawn)])
        if sum(map(len, queries)) >= count:
            break
    return torch.cat(queries)[:count]


def recall(found: Tensor, truth: Tensor) -> float:
    """Share of the ids in `truth` (Q, K) that are in the same row of `found` (Q, K)."""
    return (truth[:, :, None] == found[:, None, :]).any(-1).float().mean().item()


def _exact(kb: ImageKnowledgeBase, queries: Tensor, k: int, progress: bool) -> Tensor:
    """The ids of the true k nearest (Q, K), shard by shard."""
    results, offsets, start = [], [], 0
    with progress_bar(total=len(kb), desc="search exactly", unit=" images", unit_scale=True, shown=progress) as bar:
        for vectors in kb.shards():
            results.append(ip_topk(queries, vectors, min(k, len(vectors))))
            offsets.append(start)
            start += len(vectors)
            bar.update(len(vectors))
    return merge_topk(results, offsets, k).indices


def _tuned(
    kb: ImageKnowledgeBase,
    index: Any,
    start: IndexParameters,
    queries: Tensor,
    device: torch.device | str,
    progress: bool,
) -> IndexParameters:
    """`start` with the search of least `_work` that reaches `start.target` on the first half of the queries plus a
    margin, and on the second half. The recall in the result is that of the second half."""
    truth = _exact(kb, queries, start.k, progress)
    half = len(queries) // 2
    searcher = FaissIndex(kb, index, replace(start, candidates=CANDIDATES[0]), device)
    searches, candidates = _searches(index), list(CANDIDATES)
    best, least, tuned, measured = None, float("inf"), 0.0, 0.0
    while searches and candidates:
        tried = replace(start, search=searches[0], candidates=candidates[0])
        work = _work(index, tried.search, tried.candidates * start.k, kb.dim)
        if work > GIVE_UP * least:
            break
        try:
            searcher.use(tried)
        except RuntimeError:  # faiss cannot search more cells on a GPU
            break
        found = searcher.search(queries, start.k).indices
        tuned, measured = recall(found[:half], truth[:half]), recall(found[half:], truth[half:])
        if tuned < start.target + _margin(start.target, half) or measured < start.target:
            searches = searches[1:]
            continue
        candidates = candidates[1:]
        if work < least:
            best, least = replace(tried, recall=measured), work
    if best is None:
        raise ValmError(
            f"{start.factory} finds at most {tuned:.3f} of the {start.k} nearest on the tuning queries and "
            f"{measured:.3f} on other queries, too few to be sure of the target {start.target}. Use finer codes (a "
            "factory with SQ8 or Flat), or a lower target, for which the filled index is kept"
        )
    return best


def _margin(target: float, queries: int) -> float:
    """How far the tuning half must exceed the target: a setting that only just reaches the target misses it on about
    half of other samples. It is the standard error of a share of `queries` queries."""
    return (target * (1 - target) / queries) ** 0.5


def _work(index: Any, search: str, candidates: int, dim: int) -> float:
    """Bytes that a search reads for a query. They are counted, not timed, so that equal inputs make equal indexes.

    search: faiss's search parameters (`_searches`); candidates: vectors (dim,) reranked exactly.
    """
    faiss = import_faiss()
    exact = RANDOM_READ * candidates * dim * np.dtype(np.float16).itemsize
    ivf = faiss.try_extract_index_ivf(index)
    setting = int(search.partition("=")[2] or 0)
    if ivf is not None:
        return exact + setting * (ivf.ntotal / ivf.nlist) * ivf.code_size
    searched = stages(index)[1]
    if isinstance(searched, faiss.IndexHNSW):
        # each visited node is compared with this many neighbours
        return exact + RANDOM_READ * setting * searched.hnsw.nb_neighbors(0) * searched.d * 4
    return exact + searched.ntotal * searched.sa_code_size()


def _searches(index: Any) -> list[str]:
    """faiss's search parameters for `index`, from the fastest to the best; "" if the index takes none."""
    faiss = import_faiss()
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        return [f"nprobe={cells}" for cells in _ladder(ivf.nlist)]
    if isinstance(stages(index)[1], faiss.IndexHNSW):
        return [f"efSearch={width}" for width in _ladder(index.ntotal)]
    return [""]


def _ladder(most: int) -> list[int]:
    """1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ... up to `most`."""
    steps = {1, most}
    power = 4
    while power < 2 * most:
        steps |= {power * quarters // 4 for quarters in range(2, 8)}
        power *= 2
    return sorted(step for step in steps if step <= most)
