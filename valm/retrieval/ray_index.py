"""Searches a large knowledge base on the machines of a Ray cluster (requirements: `valm.store.ray`)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.store.ray import connect, free_tasks, import_ray, task_result
from valm_kernels import FlatIPIndex, TopK, merge_topk


class ShardedIndex:
    """Exact search over a knowledge base whose vectors are spread over Ray actors: the `index` of a `Retriever`.

    Each of `actors` actors holds an equal share of the rows in memory, as a `FlatIPIndex`. If its machine is lost,
    another machine reads the rows again. Results equal those of a single index bit for bit.

    Raises:
        ValmError: as `RayRun`, or there are more actors than rows, or no core is left for the process that queries the
            actors.
        ImportError: as `RayRun`.
    """

    def __init__(self, kb: ImageKnowledgeBase, actors: int, address: str, *, cpus: int = 1):
        if not 1 <= actors <= len(kb):
            raise ValmError(f"actors must be from 1 to the {len(kb)} images of {kb.path}, got {actors}")
        connect(address)
        ray = import_ray()
        room = free_tasks(cpus)
        if actors >= room:
            raise ValmError(
                f"{actors} actors of {cpus} cores leave no room for the process that queries them, in a cluster with "
                f"room for {room} actors: use fewer actors"
            )
        lasting = {"max_restarts": -1, "max_task_retries": -1}
        actor = ray.remote(_Rows).options(num_cpus=cpus, scheduling_strategy="SPREAD", **lasting)
        ends = [len(kb) * number // actors for number in range(actors + 1)]
        self._offsets = ends[:-1]
        self._actors = [actor.remote(kb, start, stop) for start, stop in pairwise(ends)]
        self.kb = kb

    def __len__(self) -> int:
        return len(self.kb)

    def search(self, queries: Tensor, k: int) -> TopK:
        """The `k` best rows of each query (..., E), by (score falling, row rising)."""
        flat = import_ray().put(queries.reshape(-1, queries.shape[-1]).float().cpu().numpy())
        tasks = [actor.search.remote(flat, k) for actor in self._actors]
        found = [task_result(task, "a search actor") for task in tasks]
        results = [TopK(*map(torch.tensor, arrays)) for arrays in found]  # copies: Ray's arrays are read-only
        scores, rows = merge_topk(results, self._offsets, k)
        shape = (*queries.shape[:-1], k)
        return TopK(scores.reshape(shape).to(queries.device), rows.reshape(shape).to(queries.device))


class _Rows:
    """An actor: rows [start, stop) of a knowledge base, ready for search."""

    def __init__(self, kb: ImageKnowledgeBase, start: int, stop: int):
        # kb was opened again here, which checks its fingerprint: an actor may be restarted much later
        self.index = FlatIPIndex(kb.gather(np.arange(start, stop)))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows, (Q, k), or fewer columns if there are fewer rows."""
        found = self.index.search(torch.tensor(queries), min(k, len(self.index)))
        return found.scores.numpy(), found.indices.numpy()
