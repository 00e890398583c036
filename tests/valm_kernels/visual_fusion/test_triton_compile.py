"""The kernels compile for every architecture they are meant for, and the compiler's figures are those on record."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing in an interpreting process", allow_module_level=True)

import triton

from tests.valm_kernels.visual_fusion.triton_compile import SHARED_PER_BLOCK, all_cases, compile_case, read_table

# The tiles of 8.0 also serve 8.6, 8.9 and 12.x, whose blocks have less shared memory.
SHARED_LIMIT = {**SHARED_PER_BLOCK, 80: 99 * 1024}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def is_quick(case: str, kernel: str, pooled: bool, arch: int, head_dim: int, dtype: str) -> bool:
    quick_kernel = kernel in ("forward", "query", "key") and not pooled
    return quick_kernel and arch == 90 and head_dim in (64, 128) and dtype == "float16"


def cases():
    for case in all_cases():
        marks = () if is_quick(*case) else pytest.mark.slow
        yield pytest.param(*case, marks=marks, id="-".join(map(str, (case[0], *case[3:]))))


every_case = pytest.mark.parametrize(("case", "kernel", "pooled", "arch", "head_dim", "dtype"), list(cases()))


@every_case
def test_compiles_within_limits(case, kernel, pooled, arch, head_dim, dtype):
    """What holds under every version of Triton."""
    report = compile_case(case, kernel, pooled, arch, head_dim, dtype)
    assert report.shared_bytes <= SHARED_LIMIT[arch]
    if dtype != "float32" or head_dim <= 128 or kernel in ("merge", "pool"):
        assert report.spill_bytes == 0
    if kernel in ("forward", "query", "key"):
        assert report.mma
    # the tiles of D = 256 are too small for the instructions of a whole warp group
    if dtype != "float32" and head_dim <= 128 and case in ("forward", "forward pooled", "backward key"):
        assert TENSOR_CORES[arch] in report.mma


@every_case
def test_figures_are_those_on_record(case, kernel, pooled, arch, head_dim, dtype):
    """Registers, spills, shared memory and occupancy, under the version of Triton that the table was written with."""
    version, table = read_table()
    if triton.__version__ != version:
        pytest.skip(f"docs/triton_compile.csv has the figures of Triton {version}, here is {triton.__version__}")
    assert compile_case(case, kernel, pooled, arch, head_dim, dtype) == table[case, arch, head_dim, dtype], (
        "the compiler's figures changed; where that is meant, write the table anew with "
        "`python -m tests.valm_kernels.visual_fusion.triton_compile`"
    )


def test_table_has_every_case():
    _, table = read_table()
    assert list(table) == [(case, arch, head_dim, dtype) for case, _, _, arch, head_dim, dtype in all_cases()]
