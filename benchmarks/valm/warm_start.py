"""What a search could save by starting from the candidates of the token before.

    python -m benchmarks.valm.warm_start KB --clip CLIP --text FILE.jsonl --images 100000

Neighbouring tokens ask nearly the same. A search of fewer cells, together with the candidates that the token before
found, is compared at equal recall with the search that the index was tuned to; so is a search that gives a token
the images of the one before where their queries are nearly equal. Times are of one thread's processor, so that other
work on the machine matters less.

The CLIP and the knowledge base are trained ones, such as a study's; the images are made of the latter's by `perturbed`.
The index is tuned on queries of both kinds of one half of the texts, and the tokens of the other half are searched for.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.valm.inputs import knowledge_base_of, perturbed
from benchmarks.valm.thread_time import thread_seconds
from valm.clip import Clip
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import QUERIES, ContextEncoder
from valm.retrieval.faiss_index import FaissIndex, _rerank
from valm.retrieval.index_factory import choose_factory, import_faiss
from valm.retrieval.index_tuning import build_index, context_queries, recall
from valm.tokenizer import padded
from valm_kernels import FlatIPIndex

K = 4
SHARD = 125_000
# Cosines from which a token has the images of the one before.
SAME = (0.999, 0.99, 0.98, 0.95, 0.9)


def larger(kb: ImageKnowledgeBase, count: int, out: Path, clip: Clip) -> ImageKnowledgeBase:
    """`count` images made by perturbing those of `kb`."""
    real = kb.vectors().astype(np.float32)

    def shards() -> Iterator[np.ndarray]:
        for number, start in enumerate(range(0, count, SHARD)):
            yield perturbed(real, min(SHARD, count - start), number)

    return knowledge_base_of(shards(), out, clip)


def in_order(encoder: ContextEncoder, texts: list[str], count: int) -> tuple[Tensor, Tensor]:
    """The first `count` queries (Q, E) of `texts`, and which (Q,) are of a text's first token."""
    ids, mask = padded(encoder.tokenizer(texts[:count])["input_ids"])  # a text has a token at least
    first = torch.zeros_like(mask, dtype=torch.bool)
    first[:, 0] = True
    real = mask.bool()
    return encoder(ids, mask)[real][:count], first[real][:count]


def before(rows: Tensor, first: Tensor) -> Tensor:
    """The row (Q, ...) before each of `rows`, -1 for the first of a text."""
    return rows.roll(1, 0).masked_fill(first[:, None], -1)


def indexed(kb: ImageKnowledgeBase, encoders: list[ContextEncoder], texts: list[str], count: int) -> FaissIndex:
    """The index of `kb`, tuned on `count` queries of each kind."""
    kinds = [context_queries(encoder, texts, count) for encoder in encoders]
    queries = torch.cat([kind.chunk(2)[half] for half in (0, 1) for kind in kinds])
    factory = choose_factory(len(kb), kb.dim)
    assert factory is not None, "too few images for an index"
    return build_index(kb, queries, factory, k=K, progress=False)


def report(index: FaissIndex, encoder: ContextEncoder, texts: list[str], count: int) -> None:
    kb = index.kb
    queries, first = in_order(encoder, texts, count)
    truth = FlatIPIndex(kb.vectors()).search(queries, K).indices
    candidates = K * index.parameters.candidates
    found = torch.from_numpy(index._find(queries.numpy(), candidates))
    searched = index.search(queries, K).indices
    print(f"{encoder.query}: {len(queries):,} tokens, recall@{K} {recall(searched, truth):.3f}")

    later = ~first
    cosine = (queries[1:] * queries[:-1]).sum(1)[later[1:]]
    print(f"  cosine of neighbouring queries: median {cosine.median():.3f}")
    shared = recall(before(searched, first)[later], searched[later])
    among = recall(before(found, first)[later], searched[later])
    print(
        f"  of a token's {K} images: {shared:.3f} are the token's before, {among:.3f} among its {candidates} candidates"
    )

    assert index._cells is not None, "an index of another kind"
    transformed = queries.numpy()
    for transform in index._transforms:
        transformed = transform.apply(transformed)
    asked = torch.from_numpy(transformed)
    cells, distances = index._cells._nearest(asked)
    selected = torch.from_numpy(cells)
    print(f"  of its {cells.shape[1]} cells {recall(before(selected, first)[later], selected[later]):.3f} are too")

    def select() -> None:
        for transform in index._transforms:
            transform.apply(queries.numpy())
        index._cells._nearest(asked)

    parts = {
        "select cells": thread_seconds(select),
        "scan": thread_seconds(lambda: index._cells._ivf.search_preassigned(transformed, candidates, cells, distances)),
        "rerank": thread_seconds(lambda: _rerank(kb, queries, found, K)),
    }
    whole = sum(parts.values())
    print(
        f"  {1e6 * whole / len(queries):.0f} us a token:",
        *(f"{name} {part / whole:.0%}" for name, part in parts.items()),
    )

    tuned = index.parameters
    for quarters in (4, 3, 2, 1):
        cells_searched = max(1, quarters * int(tuned.search.partition("=")[2]) // 4)
        index.use(replace(tuned, search=f"nprobe={cells_searched}"))

        def warm() -> Tensor:
            fewer = torch.from_numpy(index._find(queries.numpy(), candidates))
            both = torch.cat([fewer, before(fewer, first)], 1).sort(1).values
            both[:, 1:].masked_fill_(both[:, 1:] == both[:, :-1], -1)  # each once
            return _rerank(kb, queries, both, K)[1]

        cold = recall(index.search(queries, K).indices, truth)
        cold_s = thread_seconds(lambda: index.search(queries, K))
        print(
            f"  {cells_searched} cells: recall {cold:.3f}, time {cold_s / whole:.2f}; with the candidates of the token "
            f"before {recall(warm(), truth):.3f}, {thread_seconds(warm) / whole:.2f}"
        )

    index.use(tuned)

    for least in SAME:
        same = torch.zeros_like(later)
        same[1:] = later[1:] & ((queries[1:] * queries[:-1]).sum(1) > least)
        copied = searched.clone()
        for row in same.nonzero()[:, 0].tolist():  # in order: a row of equal tokens has the images of its first
            copied[row] = copied[row - 1]
        print(
            f"  skipped where the cosine is over {least}: {same.float().mean():.3f}, recall {recall(copied, truth):.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kb", type=Path)
    parser.add_argument("--clip", required=True)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with a text each")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=1024, help="queries of each kind, to tune and to search for")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import_faiss().omp_set_num_threads(1)
    clip = Clip.load(arguments.clip)
    texts = [json.loads(line)["text"] for line in arguments.text.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        kb = larger(ImageKnowledgeBase.open(arguments.kb), arguments.images, Path(folder) / "kb", clip)
        encoders = [ContextEncoder(clip, query=query) for query in QUERIES]
        half = len(texts) // 2
        index = indexed(kb, encoders, texts[:half], arguments.tokens)
        print(f"{len(kb):,} images: {index.parameters.summary()}", flush=True)
        for encoder in encoders:
            report(index, encoder, texts[half:], arguments.tokens)


if __name__ == "__main__":
    main()
