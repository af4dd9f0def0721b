"""Machine code is read right: loops, widths and spills, on texts small enough to count by hand."""

from __future__ import annotations

from benchmarks.compiled import machine_code
from benchmarks.compiled.machine_code import Accesses

SASS = """
        /*0000*/                   LDG.E.64 R2, desc[UR6][R14.64] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDG.E.EL.128 R4, desc[UR6][R14.64] ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/               @P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   NOP ;
        /*0060*/                   STG.E.U16 desc[UR6][R14.64], R4 ;
        /*0070*/                   BRA.U !UP0, `(.L_x_1) ;
.L_x_0:
        /*0080*/                   STL [R1], R0 ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   LDG.E R4, desc[UR6][R14.64] ;
        /*00b0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00c0*/                   LDG.E R4, desc[UR6][R14.64] ;
        /*00d0*/                   BRA `(.L_x_4);
"""


def test_sass_loop_includes_the_block_moved_out_of_line_and_not_the_trap() -> None:
    inside, outside = machine_code.accesses(machine_code.parse_sass(SASS))
    assert inside == Accesses(loads={16: 1, 4: 1}, stores={2: 1})
    assert outside == Accesses(loads={8: 1}, spills=1)


AMDGCN = """
kernel:                                 ; @kernel
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tbuffer_load_dwordx4 v[10:13], v1, s[20:23], 0 offen
\tv_exp_f32_e32 v10, v10
\tglobal_store_short v1, v0, s[0:1]
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\tglobal_load_dwordx2 v[0:1], v1, s[0:1]
\tv_readlane_b32 s8, v20, 3
\tscratch_store_dword off, v0, s33
\ts_endpgm
.Lfunc_end0:
    .private_segment_fixed_size: 16
    .vgpr_count:     28
    .vgpr_spill_count: 3
"""


def test_amd_loops_widths_and_spills() -> None:
    inside, outside = machine_code.accesses(machine_code.parse_amdgcn(AMDGCN))
    assert inside == Accesses(loads={16: 1}, stores={2: 1})
    assert outside == Accesses(loads={8: 1}, spills=1, lane_moves=1)
    expected = {"private_segment_fixed_size": 16, "vgpr_count": 28, "vgpr_spill_count": 3}
    assert machine_code.amd_resources(AMDGCN) == expected


def test_of_nested_loops_the_inner_one_is_inside() -> None:
    text = """
.L_x_0:
        /*0000*/                   LDG.E.64 R2, desc[UR6][R14.64] ;
.L_x_1:
        /*0010*/                   LDG.E R4, desc[UR6][R14.64] ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
"""
    inside, outside = machine_code.accesses(machine_code.parse_sass(text))
    assert (inside.loads, outside.loads) == ({4: 1}, {8: 1})


def test_a_branch_back_from_cold_code_is_not_a_loop() -> None:
    text = """
        /*0000*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0010*/                   LDG.E R4, desc[UR6][R14.64] ;
        /*0020*/                   EXIT ;
.L_x_1:
        /*0030*/                   STG.E desc[UR6][R14.64], R4 ;
        /*0040*/                   BRA `(.L_x_0) ;
"""
    inside, outside = machine_code.accesses(machine_code.parse_sass(text))
    assert inside == Accesses()
    assert outside == Accesses({4: 1}, {4: 1})
