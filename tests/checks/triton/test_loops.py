"""The reader of loops, on code written by hand."""

from tests.checks.triton.loops import Spills, products_in_ptx, products_of_amd, spills_in_sass, spills_of_amd

# The loop over keys is laid out as compilers do: its end stands before its head.
SASS = """
        /*0000*/                   STL [R1], R2 ;                              /* 0x0 */
        /*0010*/                   LDL R3, [R1+0x4] ;
        /*0020*/              @P0 BRA 0x10 ;
        /*0030*/                   BSSY B0, 0x90 ;
        /*0040*/                   BRA 0x70 ;
        /*0050*/                   STL.64 [R1], R2 ;
        /*0060*/              @!P1 BRA P2, 0x90 ;
        /*0070*/                   HMMA.16816.F32 R4, R8, R6, R4 ;
        /*0080*/                   BRA.U 0x50 ;
        /*0090*/                   LDL R3, [R1] ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0 ;
"""

PTX = """
	mov.b32 	%r7, 68157456;
	bra.uni 	$L__BB0_2;
$L__BB0_1:                              //   in Loop: Header=BB0_2 Depth=1
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %f1 }, { %r1 }, { %r2 }, { %f2 };
	@%p1 bra 	$L__BB0_3;
$L__BB0_2:
	wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%f1}, %rd5, %rd6, 1, 1, 1, 0, 0;
	@%p2 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], [ %r2 + 8 ], %rd3, %r7, %p3;
	bra.uni 	$L__BB0_1;
$L__BB0_3:
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %f1 }, { %r1 }, { %r2 }, { %f2 };
	ret;
"""

AMD = """
_key_kernel:                            ; @_key_kernel
	scratch_store_dword off, v1, off    ; 4-byte Folded Spill
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	scratch_load_dword v1, off, off     ; 4-byte Folded Reload
	s_cbranch_scc1 .LBB0_1
	s_branch .LBB0_3
.LBB0_2:
	scratch_load_dwordx2 v[1:2], off, off
	s_cbranch_scc0 .LBB0_4
.LBB0_3:
	v_mfma_f32_32x32x8_f16 v[0:15], v[16:17], v[18:19], v[0:15]
	v_mfma_f32_16x16x16_f16 v[0:3], v[16:17], v[18:19], v[0:3]
	s_branch .LBB0_2
.LBB0_4:
	s_endpgm
"""


def test_spills_are_counted_inside_loops():
    assert spills_in_sass(SASS) == Spills(text=1, images=1)
    assert spills_in_sass(SASS.replace("@!P1 BRA P2, 0x90", "EXIT")) == Spills(text=0, images=1)
    assert spills_of_amd(AMD) == Spills(text=1, images=1)
    assert spills_of_amd(AMD.replace("s_branch .LBB0_2", "s_endpgm")) == Spills(text=0, images=1)


def test_products_of_a_loop_are_those_of_all_warps():
    # by 8 warps, by 2 groups of 4 warps, by the program with M 64 and N 64
    assert products_in_ptx(PTX, warps=8) == 8 * 16 * 8 * 16 + 2 * 64 * 32 * 16 + 64 * 64 * 16
    assert products_in_ptx("ret;", warps=8) == 0
    assert products_of_amd(AMD, warps=4) == 4 * (32 * 32 * 8 + 16 * 16 * 16)
