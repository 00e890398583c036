"""faiss on GPUs: an index is moved there and tried, because only faiss knows which indexes its GPUs can search."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from valm.errors import ValmError
from valm.retrieval.index_parameters import import_faiss, stages


def faiss_device(device: torch.device | str) -> torch.device:
    """Where faiss searches for a caller on `device`: there if it is a GPU that faiss supports, else on the CPU."""
    device = torch.device(device)
    return device if device.type == "cuda" and import_faiss().get_num_gpus() > 0 else torch.device("cpu")


def on_gpus(index: Any, device: torch.device, search: str, count: int) -> Any:
    """A copy of a faiss index on the GPU `device`, or divided over all GPUs that faiss sees if `device` has no number.

    Transforms stay on the CPU. One query is searched, to try the index.

    Args:
        search: faiss's search parameters, such as "nprobe=32".
        count: number of candidates of a query.

    Raises:
        ValmError: faiss has no GPU.
        RuntimeError: faiss cannot search this index there, because of its kind, `search`, `count` or memory.
    """
    faiss = import_faiss()
    if faiss.get_num_gpus() == 0:
        raise ValmError("faiss has no GPU here: pip uninstall faiss-cpu, pip install -e '.[gpu]', or search on the CPU")
    if isinstance(stages(index)[1], faiss.IndexIVFPQR):  # faiss would silently drop the second codes and find fewer
        raise RuntimeError("faiss does not support refined codes (PQ8+4) on GPUs")
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True  # in float32 the lookup tables of 64 bytes of code exceed the shared memory
    options.use_cuvs = False  # it has other limits
    options.shard = True
    gpus = list(range(faiss.get_num_gpus())) if device.index is None else [device.index]
    copy = faiss.index_cpu_to_gpus_list(index, options, gpus)
    faiss.GpuParameterSpace().set_index_parameters(copy, search)
    copy.search(np.zeros((1, index.d), np.float32), min(count, index.ntotal))
    return copy
