"""faiss on GPUs: what an index must be to be searched there, and how it gets there.

The limits are those of faiss 1.15.1 without cuVS, read in its sources (github.com/facebookresearch/faiss):
- kinds of index and of coarse quantizer: `ToGpuCloner::clone_Index`, faiss/gpu/GpuCloner.cpp;
- product codes: `GpuIndexIVFPQ::verifyPQSettings_`, faiss/gpu/GpuIndexIVFPQ.cu, and `IVFPQ::isSupportedPQCodeLength`,
  faiss/gpu/impl/IVFPQ.cu;
- scalar codes: `isSQSupported`, faiss/gpu/impl/GpuScalarQuantizer.cuh;
- cells and candidates of a query: `validateNProbe` and `validateKSelect`, faiss/gpu/impl/IndexUtils.cu, with
  GPU_MAX_SELECTION_K of faiss/gpu/utils/DeviceDefs.cuh.
"""

from __future__ import annotations

from typing import Any

import torch

from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.index_parameters import choose_factory, import_faiss, stages

# The most cells that a query searches, and the most candidates that it gets.
MAX_SELECTED = 2048
# Bytes of a product code, of 8 bits for each of its parts; those above 48 with lookup tables in float16 only.
PRODUCT_CODES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
SCALAR_CODES = ("8bit", "8bit_uniform", "8bit_direct", "4bit", "4bit_uniform", "6bit", "fp16")


class NotOnGPUs(ValmError):
    """faiss cannot search an index on GPUs."""


def faiss_device(device: torch.device | str) -> torch.device:
    """Where faiss searches for a caller that computes on `device`: there if it is a GPU and faiss has GPUs, else on the
    CPU.

    Raises:
        ImportError: faiss is not installed.
    """
    device = torch.device(device)
    return device if device.type == "cuda" and import_faiss().get_num_gpus() > 0 else torch.device("cpu")


def check_for_gpus(kb: ImageKnowledgeBase, index: Any, search: str, candidates: int) -> None:
    """Raises unless faiss can search `index` on GPUs.

    Args:
        search: faiss's search parameters, such as "nprobe=32".
        candidates: number of candidates of a query.

    Raises:
        NotOnGPUs: it cannot; the message says why and names the factory string of an index that it can search.
    """
    if import_faiss().get_num_gpus() == 0:
        raise NotOnGPUs("faiss has no GPU here: pip uninstall faiss-cpu, pip install -e '.[gpu]', or search on the CPU")
    if reason := _not_held(index):
        instead = choose_factory(len(kb), kb.dim, "cuda") or "Flat"
        raise NotOnGPUs(
            f"faiss on a GPU has {reason}: make the index with the factory string {instead!r} "
            f"(`valm kb index {kb.path} --device cuda`), or search on the CPU"
        )
    cells = int(search.removeprefix("nprobe=")) if search.startswith("nprobe=") else 1
    if cells > MAX_SELECTED:
        raise NotOnGPUs(
            f"faiss on a GPU searches at most {MAX_SELECTED:,} cells for a query, the index of {kb.path} needs "
            f"{cells:,}: tune it for GPUs with `valm kb index {kb.path} --device cuda`, or search on the CPU"
        )
    check_candidates(candidates)


def check_candidates(count: int) -> None:
    """Raises NotOnGPUs if a query cannot have `count` candidates on a GPU."""
    if count > MAX_SELECTED:
        raise NotOnGPUs(
            f"faiss on a GPU finds at most {MAX_SELECTED:,} candidates for a query, {count:,} are needed: ask for "
            f"fewer images, or search on the CPU"
        )


def on_gpus(index: Any, device: torch.device) -> Any:
    """A copy of a faiss index on the GPU `device`, or, without a number, divided over all GPUs that faiss sees.

    Its transforms stay on the CPU.

    Raises:
        NotOnGPUs: there is no such GPU, or not enough memory.
    """
    faiss = import_faiss()
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True  # lookup tables: in float32 those of 64 bytes of code exceed the shared memory
    options.use_cuvs = False  # its limits are others
    options.shard = True
    gpus = list(range(faiss.get_num_gpus())) if device.index is None else [device.index]
    try:
        return faiss.index_cpu_to_gpus_list(index, options, gpus)
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise NotOnGPUs(f"faiss cannot hold the index on {device} ({reason}): search on the CPU") from error


def _not_held(index: Any) -> str:
    """What of `index` faiss does not hold on a GPU; empty if it holds all."""
    faiss = import_faiss()
    searched = stages(index)[1]
    if isinstance(searched, faiss.IndexFlat):
        return ""
    # not their subclasses, of which it would take a part only
    if type(searched) not in (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ):
        return f"no {type(searched).__name__}, only Flat and inverted files of Flat, SQ or PQ"
    quantizer = faiss.downcast_index(searched.quantizer)
    if not isinstance(quantizer, faiss.IndexFlat):
        return f"no inverted file whose cells are found by {type(quantizer).__name__}"
    if isinstance(searched, faiss.IndexIVFPQ):
        if searched.pq.nbits != 8:
            return f"no product codes of {searched.pq.nbits} bits, only of 8"
        if searched.pq.M not in PRODUCT_CODES:
            return f"no product codes of {searched.pq.M} bytes, only of {', '.join(map(str, PRODUCT_CODES))}"
    if isinstance(searched, faiss.IndexIVFScalarQuantizer):
        held = {getattr(faiss.ScalarQuantizer, f"QT_{name}") for name in SCALAR_CODES}
        if searched.sq.qtype not in held:
            return f"no scalar codes but {', '.join(SCALAR_CODES)}"
    return ""
