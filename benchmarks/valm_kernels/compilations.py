"""Counts the kernels that a first run on a GPU compiles, without a GPU: for the estimate of gpu-check.

python -m benchmarks.valm_kernels.compilations
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.valm_kernels import tune_tiles
from tests.checks.triton.compile_record import Launch, recorders, specialise
from tests.valm_kernels.visual_fusion.problems import PROBLEMS, Problem
from tests.valm_kernels.visual_fusion.triton.test_gpu import DTYPES, LARGE, WITH_FLASH
from valm_kernels.visual_fusion import api
from valm_kernels.visual_fusion.inputs import TENSOR_NAMES, Gradients
from valm_kernels.visual_fusion.layout import empty_image_scores
from valm_kernels.visual_fusion.triton import backward, forward, joined

# Seconds per kernel on one core, an estimate: 0.3 to 2.4 s with Triton 3.6.0. Float32 with head dimensions above 128
# takes 5 to 19 s (3.7.1), because its loops over slabs are unrolled.
SECONDS, SECONDS_BY_SLABS = 1.3, 12.0

# The name of a kernel, the key of its specialisation, and whether it loads rows in slabs.
Compilation = tuple[str, str, bool]


def of_tests(arch: int) -> set[Compilation]:
    """The kernels of tests/valm_kernels/visual_fusion/triton/test_gpu.py on a GPU of compute capability `arch`."""
    found: set[Compilation] = set()
    for problem in (*PROBLEMS.values(), *LARGE.values()):
        for dtype in DTYPES:
            found |= {key(launch, arch) for launch in launches(problem, dtype, arch)}
    for name in WITH_FLASH:
        for dtype in DTYPES[1:]:
            for with_lse in (False, True):
                found |= {key(launch, arch) for launch in launches(LARGE[name], dtype, arch, with_lse, flash=True)}
    return found


def of_tiles(arch: int) -> set[Compilation]:
    """The kernels of the candidates that tune_tiles.py measures."""
    works = tune_tiles.works(arch)
    return {key(launch, arch) for work in works for launch in tune_tiles.launches(work[0], arch, *work[1:])}


def seconds(found: set[Compilation]) -> float:
    """Seconds on one core, an estimate."""
    return sum(SECONDS_BY_SLABS if by_slabs else SECONDS for *_, by_slabs in found)


def key(launch: Launch, arch: int) -> Compilation:
    """Launches with equal keys share a compilation."""
    return launch.kernel.__name__, specialise(launch, arch).key, launch.keywords.get("BY_SLABS", False)


def launches(
    problem: Problem, dtype: torch.dtype, arch: int, with_lse: bool = True, flash: bool = False
) -> Iterator[Launch]:
    """The kernels of the forward and backward in a problem's test."""
    given = problem.inputs(dtype)
    tensors = tuple(given.get(name) for name in TENSOR_NAMES)
    inputs = api.checked_inputs(tensors, given.get("causal", True), given.get("scale"), given.get("softcap"))
    if not flash:
        inputs = inputs._replace(cu_seqlens=None)
    scores = empty_image_scores(inputs, True) if problem.weights else None
    lse = torch.empty(inputs.q.shape[:3])
    results = (torch.empty_like(inputs.q), lse if with_lse else None, scores, torch.empty_like(inputs.q), lse)
    with recorders(arch) as found:
        (joined if flash else forward).forward(inputs, scores)
        (joined if flash else backward).backward(*results, inputs, [True] * len(Gradients._fields))
    for recorder in found.values():
        yield from recorder.launches


if __name__ == "__main__":
    for what, found in (("tests", of_tests(90)), ("candidates of tiles", of_tiles(90))):
        print(f"{what}: {len(found)}, {seconds(found):.0f} s on one core")
