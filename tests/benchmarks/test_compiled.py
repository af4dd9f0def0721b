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

from benchmarks import peer_kernels, roofline, static_tables
from benchmarks.compiled import gpu_static
from benchmarks.gpu_targets import TARGETS
from benchmarks.compiled.machine_code import Region
from benchmarks.static_report import EXAMPLE_VOCABULARY, ITEM_SIZE, LOGITS_WIDTH, StaticReport
from benchmarks.workloads import peers

OTHER_TARGETS = tuple(target for target in TARGETS if target != "sm_90")
OUR_KINDS = ("fused-swept", "fused-resident", "statistics", "apply", "scale")
PEER_KERNELS = {
    "liger-kernel": "liger-forward liger-backward liger-sequence-forward liger-sequence-backward liger-log-softmax "
    "liger-cross-entropy liger-scale",
    "trl": "trl-forward trl-backward trl-backward-entropy trl-forward-mask trl-backward-mask "
    "trl-backward-entropy-mask trl-chunked-forward trl-chunked-backward trl-divergence-statistics trl-divergence-jsd "
    "trl-divergence-backward",
    "cut-cross-entropy": "cce-forward cce-indexed-dot cce-backward",
}
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
    return [report for report in reports if not report.kind.startswith("peer")]


def describe(reports: list[StaticReport], what: str) -> list[tuple]:
    return [(report.target, report.name, getattr(report, what)) for report in reports]


@pytest.fixture(scope="module")
def everything() -> list[StaticReport]:
    """All kernels on sm_90, ours and the peers'."""
    return gpu_static.inspect_all(["sm_90"])


@pytest.fixture(scope="module")
def hopper(everything: list[StaticReport]) -> list[StaticReport]:
    """All variants on sm_90."""
    return ours(everything)


@pytest.fixture(scope="module")
def quick(hopper: list[StaticReport]) -> list[StaticReport]:
    """All variants on sm_90, bf16 on the other targets."""
    return hopper + gpu_static.inspect_all(OTHER_TARGETS, OUR_KINDS, ["bf16"])


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


def check_peers(reports: list[StaticReport]) -> None:
    """Every peer's kernel could be compiled, and a unit holds it."""
    found = [r for r in reports if r.kind.startswith("peer")]
    assert not describe([r for r in found if r.reason], "reason")
    assert not describe([r for r in found if not r.programs_per_sm()], "shared_bytes")


@needs_kernels
def test_no_spills_and_full_width_accesses(quick: list[StaticReport]) -> None:
    check_memory(quick)


@needs_kernels
@pytest.mark.aot
@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_no_spills_and_full_width_accesses_in_the_other_types(target: str) -> None:
    check_memory(gpu_static.inspect_all([target], OUR_KINDS, ["fp32", "fp16"]))


@needs_kernels
def test_at_most_48_different_variants_for_each_target() -> None:
    for target, listed in gpu_static.names(TARGETS).items():
        own = [name for name, kind, _ in listed if kind in OUR_KINDS]
        assert 0 < len(own) <= 48, (target, len(own))
        assert not [name for name, times in Counter(name for name, _, _ in listed).items() if times > 1]
        # Every kernel of every peer that is installed, and none of one that is not.
        expected = [kernels.split() for package, kernels in PEER_KERNELS.items() if not peers.missing(package)]
        assert {name for name, _, _ in listed} - set(own) == {name for kernels in expected for name in kernels}, target


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
    row_bytes = EXAMPLE_VOCABULARY * ITEM_SIZE["bf16"]
    chosen = [r for r in hopper if r.kind == "fused-swept" and r.dtype == "bf16" and not r.full_kl]
    assert chosen
    too_many = [r for r in chosen if r.programs_per_sm() * TARGETS["sm_90"].units * row_bytes > 50e6]
    assert not [(r.name, r.num_warps, r.registers, r.programs_per_sm()) for r in too_many]


@needs_kernels
def test_one_swept_row_at_a_time_on_each_unit_as_the_rooflines_assume(quick: list[StaticReport]) -> None:
    chosen = [r for r in quick if r.kind == "fused-swept" and r.dtype == "bf16"]
    assert {r.target for r in chosen} == set(TARGETS)
    assert not [(r.target, r.name) for r in chosen if r.programs_per_sm() != 1]


@needs_kernels
def test_peers_compile_and_fit_a_unit(everything: list[StaticReport]) -> None:
    check_peers(everything)


@needs_kernels
@pytest.mark.aot
@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_peers_compile_and_fit_a_unit_of_the_other_targets(target: str) -> None:
    check_peers(gpu_static.inspect_all([target], ["peer", "peer-gemm"]))


@needs_kernels
def test_matrix_products_of_cut_cross_entropy_count_all_their_loops(everything: list[StaticReport]) -> None:
    found = {r.name: r for r in everything if r.kind == "peer-gemm"}
    if not found:
        pytest.skip(str(peers.missing("cut-cross-entropy")))
    # The logits, and in the backward the logits again and both gradients.
    assert {name: len(r.sweeps) for name, r in found.items()} == {
        "cce-forward": 1,
        "cce-indexed-dot": 0,
        "cce-backward": 3,
    }
    assert found["cce-backward"].all_per_logit() > 3 * found["cce-forward"].all_per_logit()
    assert not any(r.dram_bound() for r in found.values())


@needs_kernels
def test_command_writes_tables_and_reports(tmp_path) -> None:
    file = tmp_path / "reports.json"
    command = "-m benchmarks.compiled.gpu_static --targets sm_90 --kind scale --dtype bf16 --no-traffic".split()
    done = subprocess.run([sys.executable, *command, "--json", str(file)], capture_output=True, text=True, check=True)
    assert "## sm_90" in done.stdout
    assert "modelled" in done.stdout
    contents = json.loads(file.read_text())
    (values,) = contents["reports"]
    report = gpu_static.report_from_dict(values)
    assert json.loads(json.dumps(asdict(report))) == values
    assert report.kind == "scale"
    (figures,) = contents["figures"]
    assert (figures["name"], figures["programs"]) == (report.name, report.programs_per_sm())
    assert figures["issue_ps"] == pytest.approx(1e12 * report.issue_bound(), abs=1e-4)
    assert contents["traffic"] is None
    assert contents["rooflines"] == []
    assert set(contents["targets"]) == set(TARGETS)
    assert set(contents["versions"]) == {"triton", "torch", *PEER_KERNELS}


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "scalars", "programs"),
    [
        # 65536 registers of 128: 16 warps, at 8 to a program.
        ("sm_80", 8, 128, 0, 0, 2),
        # 102 are granted as 104: 3328 to a warp, 4 warps in each quarter of 16384, so 16 and not 65536 // 3328 = 19.
        ("sm_90", 1, 102, 0, 0, 16),
        # 2048 threads, and no more than 32 programs of one warp.
        ("sm_100", 32, 32, 0, 0, 2),
        ("sm_80", 1, 16, 0, 0, 32),
        # 164 KB of which each program takes one more than it asks for: 3 x 54, not 3 x 55.
        ("sm_80", 4, 32, 53 * 1024, 0, 3),
        ("sm_80", 4, 32, 54 * 1024, 0, 2),
        ("sm_90", 4, 32, 75 * 1024, 0, 3),
        # More than there is.
        ("sm_80", 8, 32, 164 * 1024, 0, 0),
        ("sm_100", 32, 128, 0, 0, 0),
        # 512 vector registers of a SIMD: 84 are granted as 88, 5 wavefronts of at most 8, 20 on the four.
        ("gfx942", 4, 84, 0, 0, 5),
        ("gfx942", 16, 84, 0, 0, 1),
        ("gfx942", 16, 64, 0, 0, 2),
        ("gfx942", 1, 8, 0, 0, 32),
        # 800 scalar ones: 100 and 16 are granted as 128, 6 wavefronts, so one program of 16 and not two.
        ("gfx942", 16, 64, 0, 100, 1),
        ("gfx942", 16, 64, 0, 80, 2),
        # 64 KB of LDS.
        ("gfx942", 8, 64, 32 * 1024, 0, 2),
        ("gfx942", 8, 64, 32 * 1024 + 1, 0, 1),
    ],
)
def test_programs_that_a_unit_holds(
    target: str, warps: int, registers: int, shared: int, scalars: int, programs: int
) -> None:
    assert TARGETS[target].resident(warps, registers, shared, scalars) == programs


def test_occupancy_is_the_share_of_the_threads() -> None:
    # 16 of 64 warps; 20 of 32 wavefronts.
    assert StaticReport("", "", "bf16", "sm_80", 8, 16, registers=128).occupancy() == 0.25
    assert StaticReport("", "", "bf16", "gfx942", 4, 16, registers=84).occupancy() == 0.625


def test_modelled_bounds_by_hand() -> None:
    loops = [Region(instructions=80, mufu=16, loads={16: 2})]
    report = StaticReport("", "statistics", "bf16", "sm_80", 4, 16, loops=loops, path=Region(instructions=1024))
    # 5 instructions and one MUFU a logit, and 128 threads' 1024 instructions over a row of 32 blocks of 128 x 16.
    assert report.all_per_logit(vocabulary=65536) == 7
    assert report.issue_bound(65536) == pytest.approx(7 / (108 * 4 * 32 * 1.41e9))
    assert report.mufu_bound(65536) == pytest.approx(1 / (108 * 16 * 1.41e9))
    assert report.dram_bound() == pytest.approx(2 / 2.039e12)


def test_a_short_row_pays_for_all_that_a_program_holds() -> None:
    report = StaticReport("", "fused-resident", "bf16", "sm_90", 8, 64, path=Region(instructions=640))
    assert report.all_per_logit() == report.all_per_logit(vocabulary=256 * 64) == 10
    assert report.all_per_logit(vocabulary=256 * 16) == 40
    # Where a program holds a block of a row, every block has a program.
    assert report.all_per_logit(vocabulary=256 * 64 * 9) == 10


def test_a_block_that_is_not_whole_is_paid_for_once() -> None:
    sweep, tail = Region(instructions=160, loads={16: 2}), Region(instructions=320, loads={16: 2}, masked=True)
    path = Region(instructions=100)
    # Three whole blocks of 1024 threads x 16 logits and the rest of the row, in a loop of its own or in the sweep's.
    row, block = 3 * 1024 * 16 + 8, 1024 * 16
    own = StaticReport("", "statistics", "bf16", "sm_90", 32, 16, loops=[sweep, tail], path=path)
    assert own.all_per_logit(vocabulary=row) == pytest.approx((10 * 3 * block + 420 * 1024) / row)
    masked = StaticReport("", "peer", "bf16", "sm_90", 32, 16, loops=[tail], path=path)
    assert masked.all_per_logit(vocabulary=row) == pytest.approx((20 * 4 * block + 100 * 1024) / row)


def test_absent_peers_are_named_with_their_reason(monkeypatch) -> None:
    reason = "trl is not installed"
    monkeypatch.setattr(peers, "missing", lambda package: reason if package == "trl" else None)
    assert peers.absent() == {"trl": reason}
    assert reason in static_tables.header()
    assert gpu_static.document([], None, [])["absent"] == {"trl": reason}
    monkeypatch.setattr(peer_kernels, "missing", lambda package: "absent")
    assert peer_kernels.static_variants("sm_90") == []


def test_a_kernel_that_cannot_be_compiled_is_listed_with_the_reason() -> None:
    report = StaticReport("trl-forward", "peer", "bf16", "sm_90", 4, 16, reason="CompilationError: no")
    assert "trl-forward | bf16 | cannot be compiled: CompilationError: no" in static_tables.main_tables(
        [report], ["sm_90"]
    )
    assert not roofline.rooflines([report], [])


@needs_kernels
def test_rooflines_take_the_slowest_of_three_and_compare_with_ours() -> None:
    liger, title = "Liger cross-entropy", "fused"
    (kernel,) = roofline.our_kernels(151936, 32)[title]
    path = Region(instructions=100)
    reports = [
        StaticReport(name, "peer", "bf16", "sm_90", 32, 16, loops=[Region(instructions=n, loads={16: 2})], path=path)
        for name, n in ((kernel, 160), ("liger-cross-entropy", 1600))
    ]
    passes = [
        {"title": name, "vocabulary": 151936, "machines": {"sm_90": {"read": 1.0, "written": written}}}
        for name, written in ((title, 1.0), (liger, 2.0))
    ]
    own, peer = roofline.rooflines(reports, passes)
    assert (own.title, own.bound, own.against) == (title, "dram", "")
    assert own.seconds == pytest.approx(2 * 2 / 3.35e12)
    assert own.tokens == pytest.approx(3.35e12 / 4 / 151936)
    # 100 instructions a logit of ten blocks of 16384, and the path of 1024 threads.
    assert peer.bound == "issue"
    assert peer.seconds == pytest.approx((1638400 * 10 + 100 * 1024) / 151936 / (132 * 4 * 32 * 1.755e9))
    assert (peer.against, peer.ratio) == (title, pytest.approx(peer.seconds / own.seconds))
    text = roofline.section([own, peer])
    assert "modelled" in text
    assert f"| {peer.ratio:.2f} x fused |" in text
    assert own.as_json()["modelled_ps"] == pytest.approx(1e12 * own.seconds, abs=1e-4)
