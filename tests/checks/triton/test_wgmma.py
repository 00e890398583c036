"""The reader of wgmma's registers finds planted faults, and none in the kernels."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes for Linux only", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing in an interpreting process", allow_module_level=True)

import triton
import triton.language as tl
from triton.compiler import ASTSource

from tests.checks.triton.compile_record import (
    all_cases,
    call_inputs,
    cuobjdump,
    read_table,
    record,
    row_key,
    specialise,
    target,
)
from tests.checks.triton.wgmma import Found, check
from valm_kernels.build_info import LEAST_PTXAS, ptxas

# A product of registers whose sums are R24 to R55, in a loop; a second one adds to the same sums.
CODE = """
        /*0000*/                   MOV R4, R60 ;
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x64x16.F32 R24, R4, gdesc[UR8], RZ, !UPT ;
        /*0030*/                   HGMMA.64x64x16.F32 R24, R8, gdesc[UR12], R24, gsb0 ;
        /*0040*/                   ISETP.GE.AND P0, PT, R4, R3, PT ;
        /*0050*/                   IADD3 R12, R4, R5, RZ ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   FADD R4, R24, R55 ;
        /*0080*/               @P0 BRA 0x10 ;
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R24 ;
        /*00a0*/                   EXIT ;
"""
BEFORE_THE_WAIT = "IADD3 R12, R4, R5, RZ"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def test_registers_used_after_the_wait_are_no_fault():
    found = check(CODE)
    assert (found.products, found.from_registers, found.reused) == (2, 2, [])


def test_a_factor_of_a_wide_product_is_one_register():
    """R23 and not R24, which belongs to the sums."""
    assert not check(CODE.replace(BEFORE_THE_WAIT, "IMAD.WIDE.U32 R12, R23, UR22, RZ")).reused
    assert check(CODE.replace(BEFORE_THE_WAIT, "IMAD.WIDE.U32 R12, R24, UR22, RZ")).reused
    assert check(CODE.replace(BEFORE_THE_WAIT, "IMAD.WIDE.U32 R12, R2, UR22, R23")).reused


@pytest.mark.parametrize(
    ("old", "new", "products"),
    [
        (BEFORE_THE_WAIT, "MOV R7, RZ", 1),  # the last register of the left operand
        (BEFORE_THE_WAIT, "LDS.64 R10, [R2]", 1),  # a pair that ends in it
        (BEFORE_THE_WAIT, "SHFL.BFLY PT, R11, R60, 0x1, 0x1f", 1),
        (BEFORE_THE_WAIT, "MOV R24, RZ", 2),  # the sums, written
        (BEFORE_THE_WAIT, "FADD R2, R55, R2", 2),  # and read
        (BEFORE_THE_WAIT, "STG.E.128 desc[UR4][R2.64], R52", 2),
        (BEFORE_THE_WAIT, "STG.E.128 desc[UR4][R2.64], R21", 2),  # ends in them
        (WAIT, "NOP", 2),
        (WAIT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", 2),  # lets their group stay in flight
        ("R24, gsb0", "R24", 2),  # they belong to no group
    ],
)
def test_planted_faults(old, new, products):
    assert old in CODE
    reused = check(CODE.replace(old, new)).reused
    assert len({line.split(" <- ")[0] for line in reused}) == products, reused


def test_a_fault_on_the_way_back_of_a_loop():
    """The loop jumps to its beginning between a product and its wait."""
    early = CODE.replace(BEFORE_THE_WAIT, "@P1 BRA 0x0")
    assert [line.split(" <- ")[1] for line in check(early).reused] == ["MOV R4, R60"]


def test_code_that_cannot_be_followed_raises():
    with pytest.raises(ValueError, match="computed address"):
        check(CODE.replace(BEFORE_THE_WAIT, "BRX R12 -0x80"))
    with pytest.raises(ValueError, match="products"):
        check(CODE.replace("HGMMA.64x64x16.F32 R24, R8", "HGMMA.SP.64x64x32.F32 R24, R8") + "HGMMA.64x")


def check_compiled(source, options) -> Found:
    """Every product of the PTX is found in the machine code."""
    compiled = triton.compile(source, target=target(90), options=options)
    found = check(cuobjdump("-sass", compiled.asm["cubin"]))
    assert found.products == compiled.asm["ptx"].count("wgmma.mma_async")
    return found


@triton.jit
def _cast_product(a, b, out, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The kernel of Triton's issue: integers, loaded ahead, become the left operand in registers."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    sums = tl.zeros([M, N], tl.float32)
    for i in range(0, K, BLOCK_K):
        left = tl.load(a + m[:, None] * K + (i + k)[None, :]).to(tl.bfloat16)
        sums = tl.dot(left, tl.load(b + (i + k)[:, None] * N + n[None, :]), sums)
    tl.store(out + m[:, None] * N + n[None, :], sums)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_fault_of_ptxas_is_seen():
    """In a kernel that older versions of ptxas miscompile."""
    types = {"a": "*i8", "b": "*bf16", "out": "*fp32", "K": "i32"}
    signature = types | dict.fromkeys(("M", "N", "BLOCK_K"), "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    source = ASTSource(_cast_product, signature, {(4,): 64, (5,): 256, (6,): 128}, aligned)
    found = check_compiled(source, {"num_warps": 4, "num_stages": 3})
    assert found.from_registers == found.products == 8
    assert bool(found.reused) == (ptxas(90)[1] < LEAST_PTXAS)


def recorded():
    """The kernels of the compile record that use wgmma, with measured tiles if there are any."""
    _, table = read_table()
    for kernel, call, arch, head_dim, dtype in all_cases():
        if arch == 90 and "wgmma" in table[row_key(kernel, call, arch, head_dim, dtype)].mma:
            for each in ("float16", "bfloat16") if dtype == "float16" else (dtype,):
                yield kernel, call, head_dim, each


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kernel", "call", "head_dim", "dtype"), recorded())
def test_kernels_keep_the_registers_of_products_in_flight(kernel, call, head_dim, dtype):
    special = specialise(record(kernel, 90, call_inputs(call, head_dim, dtype), True, False), 90)
    found = check_compiled(special.source, special.options)
    assert found.products and not found.reused, found
