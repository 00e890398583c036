"""The kernels compile for every architecture they are meant for, without spills and on tensor cores."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing in an interpreting process", allow_module_level=True)

from tests.valm_kernels.visual_fusion.triton_compile import SHARED_PER_BLOCK, all_cases, compile_case

TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def is_quick(case: str, kernel: str, pooled: bool, arch: int, head_dim: int, dtype: str) -> bool:
    quick_kernel = kernel in ("forward", "query", "key") and not pooled
    return quick_kernel and arch == 90 and head_dim in (64, 128) and dtype == "float16"


def cases():
    for case in all_cases():
        marks = () if is_quick(*case) else pytest.mark.slow
        yield pytest.param(*case, marks=marks, id="-".join(map(str, (case[0], *case[3:]))))


@pytest.mark.parametrize(("case", "kernel", "pooled", "arch", "head_dim", "dtype"), list(cases()))
def test_compiles_within_limits(case, kernel, pooled, arch, head_dim, dtype):
    report = compile_case(case, kernel, pooled, arch, head_dim, dtype)
    assert report.shared_bytes <= SHARED_PER_BLOCK[arch]
    if dtype != "float32" or head_dim <= 128:
        assert report.spill_bytes == 0
    if kernel in ("forward", "query", "key"):
        assert report.mma
    # the tiles of D = 256 are too small for the instructions of a whole warp group
    if dtype != "float32" and head_dim <= 128 and case in ("forward", "forward pooled", "backward key"):
        assert TENSOR_CORES[arch] in report.mma
