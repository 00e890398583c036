"""The kernels compile for every architecture they are meant for, and the compiler's figures are those on record."""

import importlib.util
import os
from operator import le

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing in an interpreting process", allow_module_level=True)

import torch
import triton

from tests.checks.triton.compile_record import (
    BIASES,
    IMAGES,
    SHARED_PER_BLOCK,
    TABLE,
    all_cases,
    compile_case,
    compile_kernel,
    meta_inputs,
    read_table,
    row_key,
    without,
)
from valm_kernels.visual_fusion.triton.tiles import _TILES

# The tiles of 8.0 also serve GPUs whose blocks have less shared memory. Those of 12.x also have tiles of their own.
SMALL_BLOCKS = (86, 89, 120)
SHARED_LIMIT = {**SHARED_PER_BLOCK, **dict.fromkeys((80, *SMALL_BLOCKS), 99 * 1024)}
# Instructions that store or load registers in the loop over keys or queries. For the key kernel were tried as well: two
# stages (20 for 24), and 8 warps (none, but half as many products again).
TEXT_LOOP_SPILLS = {
    **{("key", call, arch, 128, "float32"): 28 for call in ("dense", "softcap image_q") for arch in (80, 90, 100)},
    ("forward", "dense", 100, 128, "float32"): 7,
    ("forward", "softcap image_q", 100, 128, "float32"): 1,
    **{("forward", call, 100, 256, "float32"): 1 for call in ("dense", "decode", "softcap image_q")},
    ("query", "softcap image_q", 100, 256, "float32"): 3,
    # beside 384 instructions of each warp for the products of a step
    **{("key", "dense", arch, 256, "float32"): spills for arch, spills in ((80, 68), (90, 68), (100, 43))},
    **{("key", "softcap image_q", arch, 256, "float32"): spills for arch, spills in ((80, 69), (90, 67), (100, 31))},
    # beside as many products as with the tiles of 8.0, which spill 66; tiles without spills (16 x 16 with 4 warps, 32 x
    # 16 with 8) take half as many products again
    ("key", "dense", 120, 128, "float32"): 2,
    # likewise: 16 x 32 with 8 warps spills none, but takes half as many products again
    ("forward", "dense", 120, 256, "float32"): 27,
    ("forward", "decode", "gfx942", 256, "float32"): 69,
    ("query", "dense", "gfx942", 256, "float32"): 92,
    ("query", "softcap image_q", "gfx942", 256, "float32"): 97,
}
# The same in the loop over images, which waits for memory; half of the tile would take twice the products of the text.
IMAGE_LOOP_SPILLS = {
    ("forward", "dense", 90, 128, "float16"): 27,
    ("forward", "softcap image_q", 90, 128, "float16"): 1,
    ("forward", "softcap image_q", 100, 128, "float16"): 9,
    ("query", "dense", 90, 128, "float16"): 178,
    ("query", "softcap image_q", 90, 128, "float16"): 273,
    ("query", "dense", 100, 128, "float16"): 269,
    ("query", "softcap image_q", 100, 128, "float16"): 246,
    ("query", "dense", "gfx942", 256, "float16"): 69,
    ("query", "softcap image_q", "gfx942", 256, "float16"): 115,
    ("query", "softcap image_q", "gfx942", 128, "float32"): 1,
    ("forward", "dense", "gfx942", 256, "float32"): 86,
    ("forward", "decode", "gfx942", 256, "float32"): 85,
    ("forward", "softcap image_q", "gfx942", 256, "float32"): 64,
    ("query", "dense", "gfx942", 256, "float32"): 159,
    ("query", "softcap image_q", "gfx942", 256, "float32"): 245,
    ("forward", "head of 80", 90, 80, "float16"): 27,
    ("query", "head of 80", 90, 80, "float16"): 182,
}
# What other versions of Triton store and load beyond that, in loops over keys or queries and over images.
OTHER_TRITONS: dict[str, tuple[dict, dict]] = {
    "3.6.0": (
        {
            ("query", "dense", "gfx942", 128, "float32"): 14,
            ("query", "softcap image_q", "gfx942", 128, "float32"): 17,
            ("query", "dense", "gfx942", 256, "float16"): 30,
            ("query", "softcap image_q", "gfx942", 256, "float16"): 34,
            ("key", "dense", 80, 128, "float32"): 32,
            **{("forward", call, "gfx942", 256, "float32"): 68 for call in ("dense", "softcap image_q")},
            ("query", "dense", "gfx942", 256, "float32"): 130,
            ("query", "softcap image_q", "gfx942", 256, "float32"): 132,
            ("key", "softcap image_q", 80, 256, "float32"): 70,
            ("key", "softcap image_q", 90, 256, "float32"): 68,
        },
        {
            ("forward", "dense", "gfx942", 128, "float16"): 90,
            ("forward", "softcap image_q", "gfx942", 128, "float16"): 44,
            ("forward", "dense", "gfx942", 256, "float16"): 96,
            ("forward", "softcap image_q", "gfx942", 256, "float16"): 40,
            ("forward", "decode", "gfx942", 256, "float16"): 96,
            ("forward", "softcap image_q", 100, 128, "float16"): 16,
            ("query", "softcap image_q", 90, 128, "float16"): 293,
            ("query", "dense", 100, 128, "float16"): 381,
            ("query", "softcap image_q", 100, 128, "float16"): 370,
            ("query", "dense", "gfx942", 256, "float16"): 122,
            ("query", "softcap image_q", "gfx942", 128, "float32"): 15,
            ("query", "softcap image_q", "gfx942", 256, "float16"): 165,
            ("forward", "dense", "gfx942", 256, "float32"): 217,
            ("forward", "decode", "gfx942", 256, "float32"): 163,
            ("forward", "softcap image_q", "gfx942", 256, "float32"): 130,
            ("query", "dense", "gfx942", 256, "float32"): 228,
            ("query", "softcap image_q", "gfx942", 256, "float32"): 273,
        },
    ),
    "3.9.0": (
        {
            ("query", "dense", 90, 64, "float32"): 2,
            ("query", "dense", "gfx942", 256, "float16"): 32,
            ("query", "softcap image_q", "gfx942", 256, "float16"): 32,
            ("query", "dense", 90, 256, "float32"): 1,
            ("query", "softcap image_q", 90, 256, "float32"): 5,
            ("query", "dense", "gfx942", 256, "float32"): 130,
            ("query", "softcap image_q", "gfx942", 128, "float32"): 64,
            ("query", "softcap image_q", "gfx942", 256, "float32"): 130,
            ("key", "dense", 90, 128, "float32"): 64,
            ("key", "softcap image_q", 90, 128, "float32"): 75,
            ("key", "dense", 90, 256, "float32"): 72,
            ("key", "softcap image_q", 90, 256, "float32"): 73,
        },
        {
            ("forward", "softcap image_q", 90, 128, "float16"): 15,
            ("query", "softcap image_q", 100, 64, "float16"): 4,
            ("query", "dense", 100, 256, "float16"): 2,
            ("query", "dense", "gfx942", 256, "float16"): 72,
        },
    ),
}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", "gfx942": "mfma"}


def is_quick(kernel: str, call: str, arch: int, head_dim: int, dtype: str) -> bool:
    quick_kernel = kernel in ("forward", "query", "key") and call == "dense"
    return quick_kernel and arch in (80, 90) and head_dim in (64, 128) and dtype == "float16"


def cases():
    for case in all_cases():
        marks = () if is_quick(*case) else pytest.mark.slow
        yield pytest.param(*case, marks=marks, id=" ".join(row_key(*case)))


@pytest.mark.parametrize(("kernel", "call", "arch", "head_dim", "dtype"), list(cases()))
def test_compiles_within_limits_and_as_on_record(kernel, call, arch, head_dim, dtype):
    """The limits hold under every version of Triton; registers, spills, shared memory and occupancy are those on record
    under the version that the table was written with. One test, so that each variant is compiled once.
    """
    case = kernel, call, arch, head_dim, dtype
    report = compile_case(*case)
    assert report.shared_bytes <= SHARED_LIMIT[arch]
    if kernel in ("forward", "query", "key"):
        assert bool(report.mma) == (call != "joined")
    found = (report.text_loop_spills, report.image_loop_spills)
    listed = zip((TEXT_LOOP_SPILLS, IMAGE_LOOP_SPILLS), OTHER_TRITONS.get(triton.__version__, ({}, {})), strict=True)
    allowed = [max(spills.get(case, 0) for spills in both) for both in listed]
    assert all(map(le, found, allowed)), f"{found} spills in loops, {allowed} allowed"
    counted = kernel in ("forward", "query", "key") and call != "joined"
    assert report.products == (pytest.approx(1.0, rel=0.02) if counted else None)
    # the tiles of D = 256 are too small for the instructions of a whole warp group
    if dtype != "float32" and head_dim <= 128 and kernel in ("forward", "key") and call not in ("decode", "joined"):
        assert TENSOR_CORES[arch] in report.mma

    version, table = read_table()
    if triton.__version__ != version:
        pytest.skip(
            f"within its limits; {TABLE.name} has the figures of Triton {version}, here is {triton.__version__}"
        )
    assert report == table[report.kernel, report.variant, report.arch], (
        "the compiler's figures changed; where that is meant, write the table anew with "
        "`python -m tests.checks.triton.compile_record`"
    )


SMALL_BLOCK_CASES = [
    (kernel, call, arch, head_dim, dtype)
    for arch, call, dtype, head_dims in (
        (86, "dense", "float16", (64, 128, 256)),
        (89, "dense", "float16", (64, 128, 256)),
        (120, "dense", "float16", (64, 128, 256)),
        (120, "softcap image_q", "float16", (64, 128, 256)),
        (120, "dense", "float32", (64, 128, 256)),
    )
    for head_dim in head_dims
    for kernel in ("forward", "query", "key")
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "call", "arch", "head_dim", "dtype"),
    SMALL_BLOCK_CASES,
    ids=[" ".join(row_key(*case)) for case in SMALL_BLOCK_CASES],
)
def test_gpus_with_small_blocks_keep_their_loops_in_registers(kernel, call, arch, head_dim, dtype):
    report = compile_case(kernel, call, arch, head_dim, dtype)
    assert report.shared_bytes <= SHARED_LIMIT[arch] and TENSOR_CORES[80] in report.mma
    listed = [
        max(spills.get((kernel, call, known, head_dim, dtype), 0) for known in (80, arch))
        for spills in (TEXT_LOOP_SPILLS, IMAGE_LOOP_SPILLS)
    ]
    found = (report.text_loop_spills, report.image_loop_spills)
    assert all(map(le, found, listed)), f"{found} spills in loops, {listed} allowed"


def test_every_entry_of_the_table_of_tiles_is_compiled():
    calls = {"dense": "", "softcap image_q": " softcap", "joined": " joined"}
    compiled = set()
    for kernel, call, arch, head_dim, dtype in (*all_cases(), *SMALL_BLOCK_CASES):
        name = "decode" if call == "decode" else kernel + calls.get(call, " other")
        compiled.add((name, getattr(torch, dtype).itemsize, "AMD" if arch == "gfx942" else arch, head_dim))
    assert {(*entry, head_dim) for entry in _TILES for head_dim in (64, 128, 256)} <= compiled


DENSE, POOLED = (64, torch.float16, False), (64, torch.float16, True)

# The table has every argument switched on; here is what an ordinary call omits or has otherwise.
VARIANTS = {
    "text alone": lambda: without(meta_inputs(*DENSE), *IMAGES, *BIASES, "first_key"),
    "no biases, no first_key": lambda: without(meta_inputs(*POOLED), *BIASES, "first_key"),
    "no mask": lambda: without(meta_inputs(*DENSE), "image_mask"),
    "not causal": lambda: meta_inputs(*DENSE)._replace(causal=False),
    "not causal, no first_key": lambda: without(meta_inputs(*DENSE)._replace(causal=False), "first_key"),
    "group of three": lambda: meta_inputs(*DENSE, group=3),
    "group of eight, pooled": lambda: meta_inputs(*POOLED, group=8),
    "group of 128": lambda: meta_inputs(*DENSE, group=128),
    "group of 128, pooled": lambda: meta_inputs(*POOLED, group=128),
    "head of 80": lambda: meta_inputs(80, torch.float16, False),
    "head of 13": lambda: meta_inputs(13, torch.float16, False),
    "by head": lambda: meta_inputs(*POOLED, by_head=True),
    "by head, group of three": lambda: meta_inputs(*POOLED, group=3, by_head=True),
    "int32 index": lambda: meta_inputs(*POOLED, index_dtype=torch.int32),
    "image_q": lambda: meta_inputs(*DENSE, image_q=True),
    "image_q, pooled": lambda: meta_inputs(*POOLED, image_q=True),
    "cache_seqlens": lambda: meta_inputs(*DENSE, seqlens=True),
    "cache_seqlens, no first_key": lambda: without(meta_inputs(*POOLED, seqlens=True), "first_key"),
    "cache_seqlens, decode": lambda: without(
        meta_inputs(*POOLED, q_len=1, k_len=4096, seqlens=True), *BIASES, "first_key"
    ),
    "image weights": lambda: meta_inputs(*DENSE),
    "image weights, pooled": lambda: without(meta_inputs(*POOLED), "first_key"),
    "image_score_bias": lambda: meta_inputs(*DENSE, score_bias=True),
    "image_score_bias, pooled": lambda: without(meta_inputs(*POOLED, score_bias=True), "first_key"),
    "image_score_bias, group of eight": lambda: meta_inputs(*POOLED, group=8, score_bias=True),
    "softcap": lambda: meta_inputs(*DENSE, softcap=50.0),
    "softcap, pooled": lambda: meta_inputs(*POOLED, softcap=50.0),
    "softcap, text alone": lambda: without(meta_inputs(*DENSE, softcap=50.0), *IMAGES, *BIASES, "first_key"),
    "one image": lambda: meta_inputs(*DENSE, images=1),
    "one token": lambda: meta_inputs(*DENSE, q_len=1),
}


@pytest.mark.parametrize("kernel", ["forward", "query", "key", "pool"])
@pytest.mark.parametrize(
    "call", [c if c == "text alone" else pytest.param(c, marks=pytest.mark.slow) for c in VARIANTS]
)
def test_every_kind_of_call_compiles(call, kernel):
    inputs = VARIANTS[call]()
    if kernel == "pool" and inputs.image_index is None:
        pytest.skip("the dense layout has no pool")
    with_image_scores = call.startswith("image weights")
    _, report = compile_kernel(kernel, call, 90, inputs, with_lse=False, with_image_scores=with_image_scores)
    listed = IMAGE_LOOP_SPILLS.get((kernel, call, 90, inputs.q.shape[3], "float16"), 0)
    assert report.text_loop_spills == 0 and report.image_loop_spills <= listed
    assert report.shared_bytes <= SHARED_LIMIT[90]
    assert report.mma or kernel == "pool"


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "query", "key"])
@pytest.mark.parametrize(("head_dim", "seqlens"), [(200, False), (133, True)])
def test_float32_of_wide_heads_that_fill_no_block(kernel, head_dim, seqlens):
    """No slab beyond the last column is multiplied. In their loops 50 to 1,000 registers are stored or loaded, as masks
    take some: these sizes have no tiles of their own."""
    inputs = meta_inputs(head_dim, torch.float32, True, seqlens=seqlens)
    _, report = compile_kernel(kernel, f"head of {head_dim}", 90, inputs)
    assert report.products <= {200: 0.94, 133: 0.82}[head_dim] and report.shared_bytes <= SHARED_LIMIT[90]


def test_table_has_every_case():
    _, table = read_table()
    assert list(table) == [row_key(*case) for case in all_cases()]
