"""The reader of wgmma's registers finds planted faults."""

import pytest

from tests.checks.triton.wgmma import check

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
