"""Measures what a first run of gpu-check compiles, in seconds of one core, without a GPU: for the budgets of its steps.

    OMP_NUM_THREADS=1 python -m benchmarks.valm_kernels.compilations

Kernels of one kind have a name, a head dimension and a way to load rows in common. Up to SAMPLES kernels of each kind
are compiled, and the other kernels of the kind count with their mean. Run nothing else meanwhile.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain, product
from statistics import mean
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.valm_kernels import tune_tiles
from tests.checks.triton.compile_record import Launch, recorders, specialise
from tests.valm_kernels.visual_fusion.problems import PROBLEMS, Problem
from tests.valm_kernels.visual_fusion.triton.test_gpu import DTYPES, LARGE, WITH_FLASH
from valm_kernels.visual_fusion.checks import checked_inputs
from valm_kernels.visual_fusion.inputs import Gradients
from valm_kernels.visual_fusion.layout import empty_image_scores
from valm_kernels.visual_fusion.triton import backward, forward, joined

ARCH = 90
SAMPLES = 3

# Compiled kernels by kind and key. Launches with equal keys share a compilation.
Found = dict[tuple[Any, ...], dict[str, Any]]


def of_tests() -> Found:
    """The kernels of test_gpu.py on its small problems."""
    return by_kind(launch for problem in PROBLEMS.values() for dtype in DTYPES for launch in launches(problem, dtype))


def of_large_tests() -> Found:
    """The kernels of test_gpu.py on its large problems, which also test the measured tiles."""
    alone = (launches(problem, dtype) for problem in LARGE.values() for dtype in DTYPES)
    with_flash = (
        launches(LARGE[name], dtype, with_lse, flash=True)
        for name, dtype, with_lse in product(WITH_FLASH, DTYPES[1:], (False, True))
    )
    return by_kind(chain.from_iterable(chain(alone, with_flash)))


def of_tiles() -> Found:
    """The kernels of the candidates that tune_tiles.py measures."""
    return by_kind(
        launch for work in tune_tiles.works(ARCH) for launch in tune_tiles.launches(work[0], ARCH, *work[1:])
    )


def launches(problem: Problem, dtype: torch.dtype, with_lse: bool = True, flash: bool = False) -> Iterator[Launch]:
    """The kernels of the forward and backward in a problem's test."""
    inputs = checked_inputs(**problem.inputs(dtype))
    if not flash:
        inputs = inputs._replace(cu_seqlens=None)
    scores = empty_image_scores(inputs, True) if problem.weights else None
    lse = torch.empty(inputs.q.shape[:3])
    results = (torch.empty_like(inputs.q), lse if with_lse else None, scores, torch.empty_like(inputs.q), lse)
    with recorders(ARCH) as found:
        (joined if flash else forward).forward(inputs, scores)
        (joined if flash else backward).backward(*results, inputs, [True] * len(Gradients._fields))
    for recorder in found.values():
        yield from recorder.launches


def by_kind(found: Iterable[Launch]) -> Found:
    kinds: Found = {}
    for launch in found:
        special = specialise(launch, ARCH)
        kind = (launch.kernel.__name__, launch.keywords.get("BLOCK_D"), launch.keywords.get("BY_SLABS"))
        kinds.setdefault(kind, {})[special.key] = special
    return kinds


def seconds(found: Found) -> float:
    """Processor seconds to compile all kernels."""
    total = 0.0
    for kernels in found.values():
        # evenly among them: neighbours are alike
        samples = list(kernels.values())[:: -(-len(kernels) // SAMPLES)]
        total += len(kernels) * mean(map(seconds_to_compile, samples))
    return total


def seconds_to_compile(special: Any) -> float:
    begun = processor_seconds()
    triton.compile(special.source, target=GPUTarget("cuda", ARCH, 32), options=special.options)
    return processor_seconds() - begun


def processor_seconds() -> float:
    """Of this process and of the programs it has run, such as ptxas."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    for what in (of_tests, of_large_tests, of_tiles):
        found = what()
        count = sum(map(len, found.values()))
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TRITON_CACHE_DIR"] = cache
            print(f"{what.__name__}: {count} kernels, {seconds(found):.0f} s on one core", flush=True)


if __name__ == "__main__":
    main()
