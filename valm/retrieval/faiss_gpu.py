"""faiss on GPUs: an index is moved there, and tried, because only faiss knows what its GPUs can search."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from valm.errors import ValmError
from valm.retrieval.index_parameters import import_faiss, stages


def faiss_device(device: torch.device | str) -> torch.device:
    """Where faiss searches for a caller that computes on `device`: there if it is a GPU and faiss has GPUs, else on the
    CPU.

    Raises:
        ImportError: faiss is not installed.
    """
    device = torch.device(device)
    return device if device.type == "cuda" and import_faiss().get_num_gpus() > 0 else torch.device("cpu")


def on_gpus(index: Any, device: torch.device, search: str, count: int) -> Any:
    """A copy of a faiss index on the GPU `device`, or, without a number, divided over all GPUs that faiss sees.

    Its transforms stay on the CPU.

    Args:
        search: faiss's search parameters, such as "nprobe=32"; one query is searched by them.
        count: number of candidates of a query.

    Raises:
        ValmError: faiss has no GPU.
        RuntimeError: faiss cannot search this index there: its kind, `search`, `count`, or the memory.
    """
    faiss = import_faiss()
    if faiss.get_num_gpus() == 0:
        raise ValmError("faiss has no GPU here: pip uninstall faiss-cpu, pip install -e '.[gpu]', or search on the CPU")
    if isinstance(stages(index)[1], faiss.IndexIVFPQR):  # faiss would drop the second codes and find fewer, in silence
        raise RuntimeError("faiss's GPUs have no refined codes (PQ8+4)")
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True  # lookup tables: in float32 those of 64 bytes of code exceed the shared memory
    options.use_cuvs = False  # its limits are others
    options.shard = True
    gpus = list(range(faiss.get_num_gpus())) if device.index is None else [device.index]
    copy = faiss.index_cpu_to_gpus_list(index, options, gpus)
    faiss.GpuParameterSpace().set_index_parameters(copy, search)
    copy.search(np.zeros((1, index.d), np.float32), min(count, index.ntotal))
    return copy
