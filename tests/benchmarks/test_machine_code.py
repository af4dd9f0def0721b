"""Machine code is read right: loops, widths, masks, spills and paths, on texts small enough to count by hand."""

from __future__ import annotations

import pytest

from benchmarks.compiled import machine_code
from benchmarks.compiled.machine_code import Region
from benchmarks.static_report import StaticReport

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
        /*00a0*/                   FADD R4, R4, R4 ;
        /*00b0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
"""


def test_sass_loop_includes_the_block_moved_out_of_line_and_not_the_trap() -> None:
    code = machine_code.parse_sass(SASS)
    (loop,), outside, _ = machine_code.regions(code)
    # Load, exponential, two branches, store, and the addition and branch of the block out of line.
    assert (loop.instructions, loop.mufu, loop.loads, loop.stores, loop.spills) == (7, 1, {16: 1}, {2: 1}, 0)
    assert (outside.instructions, outside.loads, outside.spills) == (4, {8: 1}, 1)


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
\tscratch_store_dword off, v0, s33
\ts_endpgm
.Lfunc_end0:
    .private_segment_fixed_size: 16
    .vgpr_count:     28
    .vgpr_spill_count: 3
"""


def test_amd_loops_widths_and_spills() -> None:
    code = machine_code.parse_amdgcn(AMDGCN)
    (loop,), outside, _ = machine_code.regions(code)
    assert (loop.instructions, loop.mufu, loop.loads, loop.stores) == (4, 1, {16: 1}, {2: 1})
    assert (outside.loads, outside.spills) == ({8: 1}, 1)
    expected = {"private_segment_fixed_size": 16, "vgpr_count": 28, "vgpr_spill_count": 3}
    assert machine_code.amd_resources(AMDGCN) == expected


def test_of_nested_loops_the_inner_one_is_reported() -> None:
    text = """
.L_x_0:
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
        /*0010*/                   LDG.E R4, desc[UR6][R14.64] ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
"""
    (loop,), outside, path = machine_code.regions(machine_code.parse_sass(text))
    assert (loop.instructions, loop.masked) == (2, False)
    assert (outside.instructions, path.instructions) == (3, 3)


def test_a_loop_that_waits_for_a_lock_is_part_of_the_loop_around_it() -> None:
    text = """
.L_x_0:
        /*0000*/                   LDG.E.128 R4, desc[UR6][R14.64] ;
.L_x_1:
        /*0010*/                   ATOMG.E.CAS.STRONG.GPU PT, R4, [R14], R5, R6 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
"""
    (loop,), outside, path = machine_code.regions(machine_code.parse_sass(text))
    assert (loop.instructions, loop.loads) == (4, {16: 1})
    assert (outside.instructions, path.instructions) == (1, 1)


@pytest.mark.parametrize(("select", "masked"), [("v1", True), ("v3", False)])
def test_amd_masks_a_load_by_selecting_its_offset(select: str, masked: bool) -> None:
    text = f"""
.LBB0_1:
\tv_cndmask_b32_e32 {select}, v4, v5, vcc
\tbuffer_load_dwordx4 v[10:13], v1, s[20:23], 0 offen
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""
    (loop,), _, _ = machine_code.regions(machine_code.parse_amdgcn(text))
    assert loop.masked == masked


def test_remainder_of_an_unrolled_loop_is_not_another_sweep() -> None:
    loops = [
        Region(instructions=40, loads={16: 2}),
        Region(instructions=160, loads={16: 8}, stores={16: 8}),
        Region(instructions=50, loads={16: 2}, stores={16: 2}),
    ]
    report = StaticReport("", "fused-swept", "bf16", "sm_90", 32, 16, loops=loops)
    assert report.sweeps == loops[:2]
    assert report.per_logit() == [40 / 16, 160 / 64]
    assert report.once() == 50


@pytest.mark.parametrize(
    "load",
    [
        "/*0010*/              @!P1 LDG.E.128 R4, desc[UR6][R14.64] ;",
        """/*0010*/               @P1 BRA `(.L_x_1) ;
        /*0020*/                   LDG.E.128 R4, desc[UR6][R14.64] ;
.L_x_1:""",
    ],
    ids=["predicate", "branch"],
)
def test_a_load_that_not_every_trip_makes_is_masked(load: str) -> None:
    text = f"""
.L_x_0:
        {load}
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
"""
    (loop,), _, _ = machine_code.regions(machine_code.parse_sass(text))
    assert loop.loads == {16: 1}
    assert loop.masked


def test_the_path_takes_the_longer_side_of_a_branch() -> None:
    text = """
        /*0000*/               @P0 BRA `(.L_x_0) ;
        /*0010*/                   FADD R4, R4, R4 ;
        /*0020*/                   MUFU.EX2 R4, R4 ;
        /*0030*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*0040*/                   STG.E desc[UR6][R14.64], R4 ;
.L_x_1:
        /*0050*/                   EXIT ;
"""
    loops, outside, path = machine_code.regions(machine_code.parse_sass(text))
    assert not loops
    assert (outside.instructions, outside.stores) == (6, {4: 1})
    assert (path.instructions, path.mufu, path.stores) == (5, 1, {})
