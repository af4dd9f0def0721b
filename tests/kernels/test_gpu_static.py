"""The Triton kernels as machine code, without a GPU: no spills, full-width accesses, few instructions per logit.

In a normal run: every variant on sm_90 and the bf16 variants on the other targets; the rest is `make test-aot`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict

import pytest

from benchmarks import gpu_static, machine_code
from benchmarks.gpu_static import ITEM_SIZE, LOGITS_WIDTH, StaticReport
from benchmarks.machine_code import Region

OTHER_TARGETS = tuple(target for target in gpu_static.TARGETS if target != "sm_90")
# (kind, entropy): most instructions and MUFU operations per logit, summed over the loops of a bf16 kernel on sm_90.
LIMITS = {
    ("fused-swept", 0): (15.0, 2.2),
    ("fused-swept", 1): (18.0, None),
    ("fused-swept", 2): (22.0, None),
    ("statistics", 0): (8.0, 1.2),
}

needs_kernels = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def ours(reports: list[StaticReport]) -> list[StaticReport]:
    return [report for report in reports if report.kind != "peer"]


def describe(reports: list[StaticReport], what: str) -> list[tuple]:
    return [(report.target, report.name, getattr(report, what)) for report in reports]


@pytest.fixture(scope="module")
def hopper() -> list[StaticReport]:
    """All variants on sm_90."""
    return ours(gpu_static.inspect_all(["sm_90"]))


@pytest.fixture(scope="module")
def quick(hopper: list[StaticReport]) -> list[StaticReport]:
    """All variants on sm_90, bf16 on the other targets."""
    return hopper + ours(gpu_static.inspect_all(OTHER_TARGETS, dtypes=["bf16"]))


def check_memory(reports: list[StaticReport]) -> None:
    """No spills, no local memory, accesses of the logits 16 bytes wide."""
    assert reports
    assert not describe([r for r in reports if r.spills], "spills")
    assert not describe([r for r in reports if r.local_bytes], "local_bytes")
    # softcap with full KL, the largest kernel, keeps ten of gfx942's scalar registers in lanes of a vector register
    assert not describe([r for r in reports if r.lane_copies > 10 * (r.softcap and r.full_kl)], "lane_copies")
    assert not describe([r for r in reports if r.narrow_accesses], "narrow_accesses")
    # Rows that are not swept are held: all of the logits of a thread come in wide loads outside loops.
    held = [r for r in reports if not r.sweeps]
    wide = {id(r): r.outside.loads.get(LOGITS_WIDTH, 0) * LOGITS_WIDTH / ITEM_SIZE[r.dtype] for r in held}
    assert not describe([r for r in held if wide[id(r)] < r.elements_per_thread], "outside")


@needs_kernels
def test_no_spills_and_full_width_accesses(quick: list[StaticReport]) -> None:
    check_memory(quick)


@needs_kernels
@pytest.mark.aot
@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_no_spills_and_full_width_accesses_in_the_other_types(target: str) -> None:
    check_memory(ours(gpu_static.inspect_all([target], dtypes=["fp32", "fp16"])))


@needs_kernels
def test_at_most_48_different_variants_for_each_target() -> None:
    for target, listed in gpu_static.names(gpu_static.TARGETS).items():
        own = [name for name, kind, _ in listed if kind != "peer"]
        assert 0 < len(own) <= 48, (target, len(own))
        assert not [name for name, times in Counter(own).items() if times > 1]


@needs_kernels
def test_wave64_variants_never_have_32_warps(quick: list[StaticReport]) -> None:
    assert not [r.name for r in quick if r.target == "gfx942" and r.num_warps >= 32]


@needs_kernels
@pytest.mark.parametrize(("kind", "entropy"), LIMITS)
def test_instructions_per_logit(hopper: list[StaticReport], kind: str, entropy: int, record_property) -> None:
    chosen = [r for r in hopper if (r.kind, r.entropy, r.dtype) == (kind, entropy, "bf16") and r.plain]
    assert chosen
    most_instructions, most_mufu = LIMITS[kind, entropy]
    for report in chosen:
        instructions, mufu = report.per_logit(), report.per_logit("mufu")
        print(f"{report.name}: instructions {instructions}, MUFU {mufu}")
        record_property(report.name, {"instructions": instructions, "mufu": mufu})
        assert sum(instructions) <= most_instructions, report.name
        assert most_mufu is None or sum(mufu) <= most_mufu, report.name


@needs_kernels
def test_memory_is_the_bound_on_an_h100(hopper: list[StaticReport]) -> None:
    chosen = [r for r in hopper if r.dtype == "bf16" and r.plain]
    assert chosen
    slow = [r for r in chosen if max(r.issue_bound(), r.mufu_bound()) >= r.dram_bound()]
    assert not [(r.name, r.issue_bound(), r.mufu_bound(), r.dram_bound()) for r in slow]


@needs_kernels
def test_swept_rows_of_all_programs_fit_the_l2_of_an_h100(hopper: list[StaticReport]) -> None:
    # The second sweep finds its row in the L2 only if as few programs run at a time as the cache holds rows of.
    row_bytes = gpu_static.EXAMPLE_VOCABULARY * ITEM_SIZE["bf16"]
    chosen = [r for r in hopper if r.kind == "fused-swept" and r.dtype == "bf16" and not r.full_kl]
    assert chosen
    too_many = [r for r in chosen if r.programs_per_sm() * gpu_static.SMS * row_bytes > 50e6]
    assert not [(r.name, r.num_warps, r.registers, r.programs_per_sm()) for r in too_many]


@needs_kernels
def test_command_writes_tables_and_reports(tmp_path) -> None:
    file = tmp_path / "reports.json"
    command = "-m benchmarks.gpu_static --targets sm_90 --kind scale --dtype bf16".split()
    done = subprocess.run([sys.executable, *command, "--json", str(file)], capture_output=True, text=True, check=True)
    assert "## sm_90" in done.stdout
    assert "modelled" in done.stdout
    (values,) = json.loads(file.read_text())
    report = gpu_static.report_from_dict(values)
    assert json.loads(json.dumps(asdict(report))) == values
    assert report.kind == "scale"


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
