"""The harness of the benchmarks: results on disk, ratios, comparison, checks before timing, the report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_linear, bench_logprobs, bench_loss, report
from benchmarks import conftest as fixtures
from benchmarks.conftest import checked, with_peak
from benchmarks.harness import limits, memory, results
from benchmarks.harness.cases import Setup, Way, error
from benchmarks.harness.machine import ROOT, provenance, slug
from benchmarks.harness.results import LIMIT, OURS, PEER, Case, Change, Row, changes, ratio, read, save
from benchmarks.reporting.tables import case_table, changes_table
from repo_kernels.backends import cpu


def case(name: str = "fp32", suite: str = "loss", ours: float = 1.0, speed: float = 1.0, peak: float = 1e6) -> Case:
    """Return a case with ours, a peer and a copy, on a machine that is `speed` times slower."""
    rows = [
        Row("repo_loss", OURS, [speed * ours * t for t in (1.0, 1.2, 1.1)], 4e9, 1e-7, peak, tokens=100),
        Row("torch eager", PEER, [speed * t for t in (10.0, 13.2, 11.0)], 4e9, 2e-7, 3e6),
        Row("copy", LIMIT, [speed * t for t in (0.5, 0.5, 0.6)], 4e9),
        Row("Liger", PEER, reason="needs a GPU"),
    ]
    return Case(suite, name, {"tokens": 8}, "bytes", "2 NVe", "repo_loss", rows, provenance(), {"attention": "packed"})


def test_a_case_survives_the_disk_and_cases_of_another_name_stay(tmp_path: Path) -> None:
    first, second, again = case(), case("bf16"), case(ours=3.0)
    save([first, second], tmp_path)
    (path,) = save([again], tmp_path)
    assert path == tmp_path / "loss.json"
    assert read(path) == [again, second] == read(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cases": [{"suite": 1}]}', '{"cases": []}'])
def test_what_is_no_result_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"old\.json"):
        read(path)


def test_a_ratio_is_of_the_same_round() -> None:
    times = ratio(case(), "torch eager")
    assert (times.low, times.median, times.high) == pytest.approx((10, 10, 10.5))
    assert ratio(case(), "Liger") is None


def test_rates_and_the_limit() -> None:
    one = case()
    assert one.row("repo_loss").rate == pytest.approx(4e9 / 1.1)
    assert one.peak_rate == pytest.approx(4e9 / 0.5)


@pytest.mark.parametrize("speed", [0.5, 1.0, 4.0])
def test_a_slower_machine_is_no_slower_kernel_and_a_slower_kernel_is(speed: float) -> None:
    (change,) = changes([case(peak=10e6)], [case(ours=1.3, speed=speed, peak=20e6)])
    assert (change.way, change.time, change.peak) == ("repo_loss", pytest.approx(1.3), pytest.approx(2.0))
    assert change.worst == pytest.approx(2.0)


def test_one_baseline_that_changed_does_not_move_the_others() -> None:
    rows = case().rows
    slow_copy = dataclasses.replace(case(), rows=[rows[0], rows[1], rows[1], Row("copy", LIMIT, [5.0, 5.0, 6.0])])
    same_copy = dataclasses.replace(slow_copy, rows=[*slow_copy.rows[:3], rows[2]])
    assert changes([same_copy], [slow_copy])[0].time == pytest.approx(1.0)


def test_a_row_of_ours_that_is_gone_fails_and_a_small_peak_is_no_peak() -> None:
    gone = dataclasses.replace(case(), rows=case().rows[1:])
    (change,) = changes([case()], [gone])
    assert change.missing
    assert change.worst == float("inf")
    assert "**missing**" in changes_table([change], 10)
    assert changes([case(peak=1e6)], [case(peak=4e6)])[0].peak == 1.0
    assert changes([case(peak=0)], [case(peak=90e6)])[0].worst > 1e6


def test_without_a_baseline_times_are_not_compared() -> None:
    alone = dataclasses.replace(case(), rows=case().rows[:1])
    assert changes([alone], [alone])[0].time is None


def test_only_the_same_case_with_the_same_parameters_is_compared() -> None:
    other = dataclasses.replace(case(), parameters={"tokens": 9})
    assert changes([case()], [other]) == changes([case("bf16")], [case()]) == []
    assert "Nothing to compare" in changes_table([], 10)


def test_tables_tell_time_ratio_share_error_peak_and_reasons() -> None:
    table = case_table(case())
    assert "| repo_loss | 1.10 [1.05, 1.15] s | 1.00 [1.00, 1.00] | 3.6 | 45% | 91 | 1.0e-07 | 1 |" in table
    assert "Liger: needs a GPU." in table
    assert "attention: packed." in table
    assert "**25 % worse, more than 10 %**" in changes_table([Change("loss, fp32", "repo_loss", 1.25, None)], 10)


def test_error_is_the_worst_output_relative_but_for_scalars() -> None:
    expected = (torch.tensor(100.0).double(), torch.full((4,), 2.0).double())
    assert error((torch.tensor(100.5), torch.full((4,), 2.0)), expected) == pytest.approx(0.5)
    assert error((torch.tensor(100.0), torch.full((4,), 2.2)), expected) == pytest.approx(0.1)
    assert math.isnan(error((torch.tensor(100.0), torch.tensor([2, 2, 2, torch.nan])), expected))
    with pytest.raises(ValueError, match="1 outputs"):
        error(expected[:1], expected)


@pytest.mark.parametrize(
    ("module", "name"),
    [(m, name) for m in (bench_loss, bench_linear, bench_logprobs) for name in m.cases(True)]
    + [(bench_loss, "fp32, entropy with gradient"), (bench_loss, "bf16, full KL")],
    ids=lambda value: value if isinstance(value, str) else value.__name__.rpartition("_")[2],
)
def test_every_way_of_a_suite_does_the_same_as_fp64(module, name: str, monkeypatch) -> None:
    monkeypatch.setattr(limits, "SIZE", 2**20)
    parameters = module.cases(True).get(name) or module.cases(False)[name]
    parameters |= {"hidden": 64} if "hidden" in parameters else {}
    setup, absent = module.setup(**{**parameters, **module.SMALL}), dict[str, str]()
    absent |= {name: "compiled" for name, way in setup.ways.items() if way.compiled}
    errors = checked(module, parameters, setup, absent)
    asked = {name for name, way in setup.ways.items() if way.tolerance is not None and not way.compiled}
    assert asked == errors.keys()  # none of them failed or was wrong, or it would be in `absent`
    assert any(setup.ways[way].role == OURS for way in asked)


def wrong_suite(role: str) -> SimpleNamespace:
    """Return a suite whose only way gives 1 where 2 is right."""
    ways = {"wrong": Way(lambda: (torch.ones(3),), role, tolerance=1e-5)}
    setup = Setup(ways, "wrong", "bytes", "", expected=lambda: (torch.full((3,), 2.0).double(),))
    return SimpleNamespace(setup=lambda **_: setup, SMALL={})


def test_a_wrong_peer_is_not_timed_and_the_table_says_why() -> None:
    suite, absent = wrong_suite(PEER), dict[str, str]()
    checked(suite, {}, suite.setup(), absent)
    assert "differs from fp64 by 5.0e-01" in absent["wrong"]


def test_ours_being_wrong_fails() -> None:
    suite = wrong_suite(OURS)
    with pytest.raises(AssertionError, match="differs from fp64"):
        checked(suite, {}, suite.setup(), {})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a process are read from /proc")
def test_the_peak_of_a_call_is_what_it_holds_at_once() -> None:
    size = 200 * 2**20

    def call() -> torch.Tensor:
        first = torch.ones(size // 4)
        return first * 2  # both at once

    assert memory.extra_peak(call) == pytest.approx(2 * size, rel=0.1)


def test_a_peak_that_cannot_be_measured_has_a_reason() -> None:
    assert "ModuleNotFoundError" in memory.in_process("benchmarks.bench_nothing", {}, "repo_loss")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a process are read from /proc")
def test_a_row_gets_the_peak_of_a_process_of_its_own() -> None:
    row = with_peak(bench_loss, bench_loss.cases(True)["fp32"], Row("repo_loss", OURS, [1.0]))
    assert row.reason is None
    assert row.extra_peak == pytest.approx(128 * 50_257 * 4, rel=0.25)  # the gradient


def run(ticks: int, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a suite with --quick on the clock of tests/benchmarks/ticks.py."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.benchmarks.ticks", "-p", "no:cacheprovider"]
    command += ["benchmarks/bench_loss.py", "--quick", "-k", "fp32", *more]
    environment = {**os.environ, "TICKS": str(ticks)}
    environment.pop("PYTEST_XDIST_WORKER", None)  # with which pytest-benchmark measures nothing
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not cpu.available(), reason="the C++ backend was not built")
@pytest.mark.long
def test_a_slowed_kernel_is_caught_by_compare(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    saved = run(100, "--save", str(tmp_path))
    assert saved.returncode == 0, saved.stdout
    (fp32,) = json.loads((tmp_path / "loss.json").read_text())["cases"]
    assert fp32["name"] == "fp32"
    ways = {row["way"] for row in fp32["rows"] if row["seconds"]}
    assert ways >= {"repo_loss", "torch eager", "copy of 1 MiB, place 4"}
    slowed = run(120, "--compare", str(tmp_path / "loss.json"))
    assert slowed.returncode == 1, slowed.stdout
    assert "**20 % worse, more than 10 %**" in slowed.stdout


def config(**options: object) -> SimpleNamespace:
    """Return a pytest configuration with these options of the benchmarks."""
    defaults = {"quick": False, "save": None, "compare": [], "percent": 10.0}
    chosen = {f"--{name}": value for name, value in (defaults | options).items()}
    return SimpleNamespace(getoption=chosen.__getitem__, stash={})


@pytest.mark.parametrize(("slower", "fails"), [(1.09, False), (1.11, True)])
def test_a_session_fails_where_ours_is_slower_by_more_than_the_percentage(slower: float, fails: bool) -> None:
    session = SimpleNamespace(config=config(compare=["old.json"]), exitstatus=pytest.ExitCode.OK)
    session.config.stash = {fixtures.OLD: [case()], fixtures.CASES: [case(ours=slower)]}
    fixtures.pytest_sessionfinish(session)
    assert session.exitstatus == (pytest.ExitCode.TESTS_FAILED if fails else pytest.ExitCode.OK)


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(pytest.UsageError, match="needs a FOLDER with --quick"):
        fixtures.pytest_configure(config(quick=True, save=fixtures.DEFAULT))
    with pytest.raises(pytest.UsageError, match=r"--compare: .* holds no results"):
        fixtures.pytest_configure(config(compare=[str(tmp_path)]))
    (tmp_path / "loss.json").write_text('{"cases": [{}]}')
    with pytest.raises(pytest.UsageError, match=r"--save: .*loss\.json is not a result"):
        fixtures.pytest_configure(config(save=str(tmp_path)))


def test_the_report_is_made_from_results_alone(tmp_path: Path, capsys) -> None:
    folder, page = tmp_path / "machine", tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    scaling = [case(f"loss, V = {v}", "scaling") for v in (8192, 16384)]
    save([case(), *scaling], folder)
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main([str(tmp_path), "--docs", str(page)])
    assert "3 cases" in capsys.readouterr().out
    for name in ("bars", "scaling"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "report.md").read_text()
    assert case_table(case()).splitlines()[4] in text
    shown = page.read_text()
    assert shown.startswith("before\n")
    assert shown.endswith("after\n")
    assert "old" not in shown
    assert "torch eager 10.00" in shown
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "nothing")])
    assert "](../machine/bars.png)" in shown
    page.write_text("no markers")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--docs", str(page)])
    assert page.read_text() == "no markers"


def test_the_docs_show_the_committed_results() -> None:
    page = ROOT / "docs" / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    cases_of = report.machines(results.FOLDER)
    assert cases_of
    assert report.written(text, cases_of, page) == text


def test_a_folder_of_other_records_is_no_machine(tmp_path: Path) -> None:
    save([case()], tmp_path / "machine")
    others = tmp_path / "records"
    others.mkdir()
    (others / "repo-0.json").write_text('{"config": {}}')
    assert list(report.machines(tmp_path)) == [tmp_path / "machine"]
    (others / "repo-1.json").write_text('{"config": ')
    with pytest.raises(ValueError, match=r"repo-1\.json is not a result"):
        report.machines(tmp_path)
    (others / "repo-1.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        report.machines(tmp_path)


def gpu_cases() -> list[Case]:
    """Return what `make gpu` may have written."""
    rows = [
        Row("repo_loss", OURS, [1.0e-3], 4e6, 1e-3, launches=5, device_seconds=5e-4),
        Row("linear_repo_loss", OURS, [2.0e-3], 4e6, extra_peak=2e9),
        Row("8 warps", OURS, [0.9e-3], 4e6),
        Row("QuACK", PEER, reason="quack-kernels is not installed"),
        Row("copy", LIMIT, [0.5e-3], 4e6),
    ]
    where = provenance() | {"processor": "NVIDIA H200"}
    names = ("losses", "call", "linear", "forms")
    cases = [Case(f"gpu_{name}", "8 x 9 bf16", {}, "bytes", "", "repo_loss", rows, where) for name in names]
    notes = {"passed": "98", "failed": "1", "tests/test_x.py::test_y": "assert 1 == 2"}
    return [*cases, Case("gpu_tests", "tests", {"files": ["tests/x.py"]}, "tests", "", "", [rows[0]], where, notes)]


def test_the_report_shows_what_make_gpu_measured(tmp_path: Path) -> None:
    folder, page = tmp_path / "nvidia-h200", tmp_path / "benchmarks.md"
    save(gpu_cases(), folder)
    page.write_text(f"before\n{report.GPU_BEGIN}\nold\n{report.GPU_END}\nafter\n")
    report.main([str(tmp_path), "--docs", str(page)])
    shown, text = page.read_text(), (folder / "report.md").read_text()
    for table in (shown, text):
        assert "| 8 x 9 bf16 | 1.000 (0.50) |" in table
        assert "| repo_loss | 1.000 (0.500, 5) |" in table
        assert "| linear_repo_loss | 2.0 (2.0) |" in table
        assert "QuACK (8 x 9 bf16): quack-kernels is not installed" in table
    assert "8 warps: 0.900 (0.56)" in text
    assert "tests/test_x.py::test_y: assert 1 == 2" in text
    assert "old" not in shown


def test_a_rehearsal_is_no_result(tmp_path: Path, capsys) -> None:
    cases = [dataclasses.replace(c, provenance={**c.provenance, "rehearsal": "not to be used"}) for c in gpu_cases()]
    save(cases, tmp_path / "machine")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert "holds a rehearsal" in capsys.readouterr().err


def test_links_of_the_docs_lead_somewhere() -> None:
    page = ROOT / "docs" / "benchmarks.md"
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_name_of_a_machine_is_a_folder_name() -> None:
    assert slug().replace("-", "").isalnum()
