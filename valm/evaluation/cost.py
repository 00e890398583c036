"""Cost of images, and accuracy against their number: the paper's table 7 for one's own model and knowledge base."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from valm.errors import ValmError
from valm.evaluation.controls import switch_images
from valm.evaluation.metrics import choice_metrics
from valm.evaluation.published import TABLES
from valm.evaluation.questions import PUBLISHED, Questions
from valm.evaluation.scorers import CausalScorer
from valm.evaluation.scoring import context_length
from valm.evaluation.suite import CACHE, Entry, Settings, asked_by, open_with, scores_of
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.progress import progress_bar
from valm.retrieval.retriever import Retriever, VectorIndex
from valm_kernels import FlatIPIndex, TopK

# Default sizes, as shares of a knowledge base.
SHARES = (0.01, 0.1, 1.0)
SEED = 0
# Size of a timed forward pass, and how often each of the three is timed.
ROWS, TOKENS, ROUNDS = 4, 256, 7


class SubsetIndex:
    """Exact search among `size` images of a knowledge base, drawn by a fixed seed; a smaller subset is part of each
    larger one."""

    def __init__(self, kb: ImageKnowledgeBase, size: int, device: torch.device):
        drawn = torch.randperm(len(kb), generator=torch.Generator().manual_seed(SEED))[:size]
        self.ids = drawn.sort().values  # (size,)
        self.index = FlatIPIndex(torch.from_numpy(kb.gather(self.ids.numpy())), dtype="float16", device=device)

    def search(self, queries: Tensor, k: int) -> TopK:
        """As `VectorIndex.search`; ids are those of the whole knowledge base."""
        scores, rows = self.index.search(queries, k)
        return TopK(scores, self.ids.to(rows.device)[rows])


def measure(
    models: Sequence[Entry],
    settings: Settings,
    knowledge_bases: Sequence[str | os.PathLike],
    sizes: Sequence[int] | None,
    out: str | os.PathLike | None = None,
    *,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measures accuracy and time for the first checkpoint of each model that sees images, each knowledge base and each
    number of images in it: the published accuracies of the settings' tasks in table 2, and the time of a forward pass
    relative to the same model without images, `cached` with images retrieved before and `live` with retrieval.

    Args:
        knowledge_bases: none for the model's own.
        sizes: by default SHARES of each knowledge base.
        out: as in `evaluate`.

    Raises:
        ValmError: no model sees images, or a size is more than the knowledge base has or less than a token needs.
    """
    asked = [
        one
        for (task, protocol), one in asked_by(settings).items()
        if task in TABLES[2][0] and protocol == PUBLISHED and isinstance(one, Questions)
    ]
    rows = []
    for entry in models:
        bases: list[str | os.PathLike | None] = list(knowledge_bases)
        for kb in bases or [None]:
            scorer = open_with(entry.sources[0], settings)
            if not isinstance(scorer, CausalScorer) or not isinstance(retriever := _own(scorer, kb), Retriever):
                continue
            fingerprint = scorer.fingerprint
            for size in progress_bar(_sizes(retriever, sizes), desc=f"{entry.name}, cost", unit="size", shown=progress):
                found = _with_images(retriever, size, cache=True)
                scorer.model.set_retriever(found)
                row: dict[str, Any] = {
                    "model": entry.name,
                    "knowledge_base": Path(retriever.kb.path).name,
                    "images": size,
                    "metrics": {},
                }
                own = [fingerprint, retriever.kb.fingerprint, str(getattr(found.index, "parameters", None)), size, SEED]
                cache = None if out is None else Path(out) / CACHE
                for one in asked:
                    with progress_bar(shown=False) as bar:
                        scores = scores_of(scorer, one, cache, own, settings.fresh, bar)
                    if "not_applicable" not in scores:
                        row["metrics"][one.task] = choice_metrics(one, np.array([scores["scores"]]), None)
                scorer.model.set_retriever(_with_images(retriever, size, cache=False))
                rows.append(row | time_forward(scorer, _ids(scorer, asked)))
    if not rows:
        raise ValmError("--cost: none of these models retrieves images")
    return rows


def _own(scorer: CausalScorer, kb: str | os.PathLike | None) -> Any:
    """The model's retriever, with `kb` instead of its own knowledge base; None if it sees no images."""
    if not scorer.sees_images:
        return None
    switch_images(scorer.model)
    retriever = scorer.model.retriever
    if kb is None or not isinstance(retriever, Retriever):
        return retriever
    return type(retriever)(retriever.encoder, ImageKnowledgeBase.open(kb), retriever.k)


def _sizes(retriever: Retriever, sizes: Sequence[int] | None) -> list[int]:
    whole = len(retriever.kb)
    chosen = [max(retriever.k, round(share * whole)) for share in SHARES] if sizes is None else sizes
    for size in chosen:
        if not retriever.k <= size <= whole:
            raise ValmError(
                f"--cost-sizes: {size} images of {retriever.kb.path}, which has {whole:,}, where each token needs "
                f"{retriever.k}"
            )
    return sorted(set(chosen))


def _with_images(retriever: Retriever, size: int, cache: bool) -> Retriever:
    index: VectorIndex = retriever.index  # the whole knowledge base is searched as usual
    if size < len(retriever.kb):
        index = SubsetIndex(retriever.kb, size, retriever.device)
    tokens = {} if cache else {"cache_tokens": 0}
    return type(retriever)(retriever.encoder, retriever.kb, retriever.k, index, **tokens)


def _ids(scorer: CausalScorer, asked: Sequence[Questions]) -> Tensor:
    """(ROWS, TOKENS) ids to be timed: the questions concatenated and repeated."""
    texts = [text for one in asked for row in one.texts for text in row] or ["The color of the sky is blue."]
    ids = scorer.tokenizer(" ".join(texts[:1000]), add_special_tokens=False, verbose=False)["input_ids"]
    length = min(TOKENS, context_length(scorer.model))
    stream = torch.tensor(ids).repeat(ROWS * length // len(ids) + 1)
    return stream[: ROWS * length].view(ROWS, length).to(scorer.model.device)


@torch.no_grad()
def time_forward(scorer: CausalScorer, ids: Tensor) -> dict[str, float]:
    """Medians of ROUNDS forward passes over `ids` (B, T), taken in turn: seconds without images, and relative to that
    with the images given (`cached`) and with them retrieved (`live`)."""
    model: Any = scorer.model
    found = model.retriever(ids)
    given = {"image_pool": found.image_pool.to(ids.device), "image_index": found.image_index.to(ids.device)}
    if model.fusion_options.scored:
        given["image_scores"] = found.scores.to(ids.device)
    without = given | {"image_pool": given["image_pool"][:0], "image_index": torch.full_like(found.image_index, -1)}
    passes: dict[str, Callable[[], Any]] = {
        "without": lambda: model(ids, **without),
        "cached": lambda: model(ids, **given),
        "live": lambda: model(ids),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(ROUNDS + 1):  # the first is a warm-up
        for name, forward in passes.items():
            start = time.perf_counter()
            forward()
            if ids.is_cuda:
                torch.cuda.synchronize(ids.device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    base = median["without"]
    return {"seconds": base, "cached": median["cached"] / base, "live": median["live"] / base}
