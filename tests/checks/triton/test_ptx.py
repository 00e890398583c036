"""How the compiled kernels move their data, and the reader of PTX that tells."""

import importlib.util
import os
from collections import Counter

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing in an interpreting process", allow_module_level=True)

from tests.checks.triton.compile_record import BIASES, DTYPES, IMAGES, compile_kernel, meta_inputs, without
from tests.checks.triton.ptx import Code, loops, whole
from valm_kernels.visual_fusion.triton.tiles import block_d

# The calls that people make: whether the images are pooled, and what is absent.
CALLS = {
    "plain": (False, (*IMAGES, *BIASES, "first_key")),
    "first_key": (False, (*IMAGES, *BIASES)),
    "dense": (False, ("image_mask", *BIASES, "first_key")),
    "pooled": (True, (*BIASES, "first_key")),
    "biases": (True, ()),
}
KERNELS = [(kernel, call) for kernel in ("forward", "query") for call in CALLS]
KERNELS += [("key", "plain"), ("key", "first_key")]
QUICK = [("forward", "pooled", 64), ("key", "first_key", 64), ("query", "biases", 128), ("key", "plain", 128)]

# Instructions between the issue of a copy and the wait for it. Shorter ways are those from the end of a loop to its
# beginning: the copy of the next tile then starts when the work on this one is done.
LONG = 100
# By (kernel, arch, head_dim, dtype), tiles of two stages: 99 KiB of shared memory hold no more, or only one program.
NOT_AHEAD = {
    ("forward", 80, 256, "float16"),
    ("key", 80, 256, "float16"),
    *(("forward", 80, head_dim, "float32") for head_dim in (72, 80, 96, 128)),
}


def cases():
    """(kernel, call, arch, head_dim, group, dtype): all calls for the common shapes, some calls for the others."""
    for kernel, call in KERNELS:
        for arch in (80, 90, 100):
            for head_dim in (64, 128):
                quick = arch == 90 and (kernel, call, head_dim) in QUICK
                yield pytest.param(kernel, call, arch, head_dim, 1, "float16", marks=() if quick else pytest.mark.slow)
    others = [(head_dim, 1, dtype) for head_dim in (72, 80, 96) for dtype in ("float16", "float32")]
    others += [(256, 1, "float16")]
    others += [(head_dim, 1, dtype) for head_dim in (64, 128) for dtype in ("bfloat16", "float32")]
    others += [(head_dim, group, "float16") for head_dim in (64, 128) for group in (4, 8, 32)]
    for kernel, call in (("forward", "pooled"), ("query", "biases"), ("key", "plain"), ("key", "first_key")):
        for arch in (80, 90, 100):
            for other in others:
                yield pytest.param(kernel, call, arch, *other, marks=pytest.mark.slow)


@pytest.mark.parametrize(("kernel", "call", "arch", "head_dim", "group", "dtype"), list(cases()))
def test_data_moves_in_vectors_and_ahead_of_use(kernel, call, arch, head_dim, group, dtype):
    pooled, absent = CALLS[call]
    inputs = without(meta_inputs(head_dim, DTYPES[dtype], pooled, group=group), *absent)
    ptx, report = compile_kernel(kernel, call, arch, inputs, with_lse=False)
    code, of_loops, itemsize = whole(ptx), loops(ptx), DTYPES[dtype].itemsize
    if (kernel, dtype) != ("key", "float32"):  # test_compile.py has what these spill
        assert report.text_loop_spills == 0
    if itemsize == 2:
        # a program reads each bias once, where that is fewer numbers than it has threads
        assert code.loads[2] <= 4 and not code.stores[2]
        assert not any(loop.loads[2] for loop in of_loops)

    def copies(rows):
        """Of two tiles, by each thread of a program."""
        return max(1, 2 * rows * block_d(head_dim) * itemsize // (16 * 32 * report.warps))

    # Triton has no transposing load of 32 bits from shared memory, and so copies nothing ahead there that a product
    # reads transposed: in the backward a tile of a query's text and both of a key's. They are loaded in vectors too.
    through_registers = itemsize == 4 and kernel != "forward"
    assert through_registers or not any(loop.loads[16] for loop in of_loops)
    if through_registers and kernel == "query":
        assert all(loop.async_copies[16] for loop in of_loops if loop.products)
    tiles = Counter(loop.async_copies[16] + loop.loads[16] for loop in of_loops)
    of_text = copies(report.block_m if kernel == "key" else report.block_n)
    assert tiles[of_text] >= (3 if call in ("first_key", "biases") and kernel != "key" else 2)
    if inputs.image_k is not None and kernel != "key":
        assert tiles[copies(report.block_m)] >= 1
    for loop in of_loops:
        if loop.async_copies[16] and (kernel, arch, head_dim, dtype) not in NOT_AHEAD:
            assert loop.copy_distance >= LONG


PTX = """
	ld.global.b64 	%rd1, [%rd2];
$L__BB0_1:
	@%p1 ld.global.L1::evict_last.v4.b32 	{ %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
	ld.global.v2.b16 	{%rs1, %rs2}, [%rd4];
	bra.uni 	$L__BB0_3;
$L__BB0_2:
	cp.async.wait_group 	1;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%f1}, %rd5, %rd6, 1, 1, 1, 0, 0;
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd7 + 0 ], 0x10, %r6;
	cp.async.ca.shared.global.L2::128B [ %r5 + 0 ], [ %rd7 + 0 ], 0x4, %r6;
	cp.async.commit_group;
	@%p2 bra 	$L__BB0_2;
$L__BB0_3:
	st.global.b8 	[%rd8], %rs3;
	@%p3 bra 	$L__BB0_1;
	ret;
"""


def test_whole_kernel():
    assert whole(PTX) == Code(Counter({8: 1, 16: 1, 4: 1}), Counter({1: 1}), Counter({16: 1, 4: 1}), 1, 13)


def test_innermost_loop_and_the_way_from_copy_to_wait():
    # a wait that lets one group fly covers what was committed an iteration earlier: 6 + 2 instructions later
    assert loops(PTX) == [Code(Counter(), Counter(), Counter({16: 1, 4: 1}), 1, 6, copy_distance=8)]
    assert loops(PTX.replace("wait_group 	1", "wait_group 	0"))[0].copy_distance == 2
    assert loops(PTX.replace("wait_group 	1", "wait_group 	0x2"))[0].copy_distance == 14
    assert loops("ret;") == []
