"""`make gpu`: a rehearsal of every line on a CPU, and what happens to a part that fails, hangs or runs out of time."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import agreement, call, forms, linear, losses, measuring, suite
from benchmarks.gpu.agreement import Finding
from benchmarks.gpu.plan import PARTS, REAL, REHEARSAL, Part
from benchmarks.harness.machine import ROOT
from benchmarks.harness.process import Deadline, Process
from benchmarks.harness.results import OURS, PEER, Case, Row, read
from tests.support.programs import gpu_part

MEASURING = ("gpu_call", "gpu_forms", "gpu_linear", "gpu_losses")
IN_SECONDS = {"timeout": 400, "capture_output": True, "text": True}


@pytest.mark.slow
def test_a_rehearsal_in_a_plain_copy_runs_every_part_and_marks_its_numbers(tmp_path: Path) -> None:
    copy, out = tmp_path / "copy", tmp_path / "out"
    for name in ("benchmarks", "repo", "repo_kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OUT")}
    parts = "--rehearse --budget=400 --parts=tests,agreement,losses,loop,call,linear,forms"
    make = ["make", "gpu", f"PYTHON={sys.executable}", f"OUT={out}", f"ARGS={parts}"]
    done = subprocess.run(make, cwd=copy, env=environment, **IN_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = {case.suite: case for case in read(out / "rehearsal.json")}
    assert set(cases) == {*MEASURING, "gpu_loop", "gpu_tests"}
    assert sorted(path.stem for path in (out / "parts").iterdir()) == sorted(cases)
    assert sorted(path.name for path in out.iterdir()) == ["parts", "rehearsal.json", "rehearsal.log", "rehearsal.md"]
    for case in cases.values():
        assert case.provenance["rehearsal"] == measuring.MEANINGLESS
        assert case.provenance["commit"].startswith("unknown (no git")
    rows = [(name, row) for name in (*MEASURING, "gpu_loop") for row in cases[name].rows]
    assert not [(name, row.way, row.reason) for name, row in rows if row.role == OURS and row.reason]
    ways = {row.way for _, row in rows if row.seconds}
    assert {"repo_loss", "repo_loss, its kernel alone", "linear_repo_loss", "as launched", "whole step"} <= ways
    errors = {row.way: row.error for _, row in rows if row.error is not None}
    for peer in ("Liger triton_grpo_loss in place", "TRL log-probs + PyTorch", "TRL ChunkedLogProbFunction + PyTorch"):
        assert errors.get(peer, 0.0) < 1e-2  # absent where the package is not installed
    table = (out / "rehearsal.md").read_text()
    assert table in done.stdout
    assert f"**{measuring.MEANINGLESS}**" in table


def test_every_size_that_was_measured_on_an_h200_is_in_the_plan() -> None:
    widths = {vocabulary for _, vocabulary, _ in REAL.losses}
    assert widths == {8192, 32_000, 49_152, 50_257, 128_256, 151_936}
    assert {vocabulary for _, vocabulary in REAL.forms} == widths | {65_536, 100_352}
    assert [head[1] for head in REAL.heads] == [4096, 896]
    assert set(REAL.compiled) <= set(REAL.losses)
    assert sum(part.limit for part in PARTS if not part.together and part.name != "other-tests") <= 350 + 30


@pytest.mark.parametrize("part", [losses, linear, call, forms], ids=lambda part: part.NAME)
def test_a_part_checks_the_widths_that_it_times(part) -> None:
    for plan in (REAL, REHEARSAL):
        for parameters in part.cases(plan).values():
            assert json.loads(json.dumps(parameters)) == parameters
            few = part.small(parameters, plan)
            assert few["tokens"] == plan.few
            assert few["vocabulary"] == parameters["vocabulary"]


def test_agreement_survives_ways_that_raise_end_their_process_or_hang(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(agreement, "LONGEST", 4.0)
    monkeypatch.setattr(agreement, "PRELOADED", ["tests.support.programs.gpu_part"])
    file, plan = tmp_path / "agreement.jsonl", REAL
    agreement.check([gpu_part], plan, file, Deadline.in_seconds(120))
    found = {way: one for (_, case, way), one in agreement.read(file).items() if case == "small"}
    assert found["ours"] == Finding(0.0)
    assert found["as slow"] == Finding(0.0)
    assert found["compiled"] == Finding(0.0)
    assert found["copy"] == Finding()
    assert "differs from fp64 by" in found["differs"].reason
    assert found["raises"].reason == "fails: TypeError: cross_entropy() got an unexpected keyword"
    assert found["ends"].reason == "fails: its process ended, exit status 7"
    assert found["hangs"].reason == "fails: its process ended, took more than 4 s"


def test_agreement_stops_at_its_deadline(tmp_path: Path, capsys) -> None:
    start = time.monotonic()
    agreement.check([gpu_part], REAL, tmp_path / "file", Deadline.in_seconds(0))
    assert time.monotonic() - start < 30
    assert "not reached" in capsys.readouterr().out


def test_what_differs_or_fails_is_a_row_with_its_reason_and_the_rest_is_timed(tmp_path: Path) -> None:
    known = {"differs": "d", "ends": "e", "hangs": "h"}
    agreed = {("losses", "small", way): Finding(reason=reason) for way, reason in known.items()}
    agreed["losses", "small", "ours"] = Finding(0.0)
    measuring.measure(gpu_part, REAL, tmp_path, Deadline.in_seconds(60), agreed)
    case, broken = read(tmp_path / "gpu_losses.json")
    reasons = {row.way: row.reason for row in case.rows if row.reason}
    failure = "fails: TypeError: cross_entropy() got an unexpected keyword"
    assert reasons == {**known, "raises": failure, "absent": "x is not installed"}
    assert {row.way for row in case.rows if len(row.seconds) == REAL.rounds["losses"]} == {
        "ours", "as slow", "compiled", "copy",
    }  # fmt: skip
    assert case.notes == {"not compared with fp64": "compiled, as slow, raises"}
    assert broken.rows[0].reason.startswith("fails: RuntimeError")


def test_a_part_that_runs_out_of_time_measures_one_round_and_says_so(tmp_path: Path, capsys) -> None:
    agreed = {("losses", "small", way): Finding(reason="left out") for way in ("ends", "hangs")}
    plan = dataclasses.replace(REAL, rounds={"losses": 10**6}, few=0)
    measuring.measure(gpu_part, plan, tmp_path, Deadline.in_seconds(0.5), agreed)
    (case,) = read(tmp_path / "gpu_losses.json")
    assert 1 <= len(case.row("ours").seconds) < 10**6
    assert case.notes["rounds"] == f"{len(case.row('ours').seconds)} of {10**6}"
    measuring.measure(gpu_part, plan, tmp_path, Deadline.in_seconds(-1), agreed)
    assert "0 rows timed, no time for small" in capsys.readouterr().out


def test_a_process_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    marker = tmp_path / "child"
    child = f"import pathlib, time; time.sleep(4); pathlib.Path({str(marker)!r}).touch()"
    (tmp_path / "hanging.py").write_text(
        f"import subprocess, sys, time\nprint('started', flush=True)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(600)\n"
    )
    path = {"PYTHONPATH": str(tmp_path)}
    process = Process("hanging", [], 2, tmp_path / "log", path)
    assert process.wait() == "stopped at its limit of 2 s"
    assert process.last_line() == "started"
    time.sleep(3)
    assert not marker.exists()
    (tmp_path / "failing.py").write_text("raise SystemExit('no such kernel')\n")
    failed = Process("failing", [], 30, tmp_path / "log2", path).wait()
    assert failed == "exit status 1: no such kernel"


def test_a_failed_part_costs_itself_and_the_exit_status(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "PARTS", (Part("losses", 60), Part("nothing", 60)))
    monkeypatch.setattr(command.Run, "environment", lambda self: {"TRITON_INTERPRET": "wrong", "OMP_NUM_THREADS": "1"})
    assert command.main(["--rehearse", "--out", str(tmp_path), "--parts", "nothing", "--budget", "60"]) == 1
    shown = capsys.readouterr().out
    assert "nothing: " in shown
    assert "invalid choice" in shown
    assert json.loads((tmp_path / "rehearsal.json").read_text())["failures"]["nothing"]
    assert command.main(["--rehearse", "--out", str(tmp_path), "--parts", "nothing", "--budget", "1"]) == 1
    assert "nothing: not started" in capsys.readouterr().out


def test_a_row_of_ours_that_is_wrong_fails_the_run_and_a_form_that_is_tried_does_not() -> None:
    rows = [Row("as launched", OURS, [1.0]), Row("32 warps", OURS, reason="differs"), Row("Liger", PEER, reason="x")]
    tried = Case("gpu_forms", "8 x 9 bf16", {}, "bytes", "", "as launched", rows, {})
    assert command.failed_rows([tried]) == []
    wrong = dataclasses.replace(tried, suite="gpu_losses")
    assert command.failed_rows([tried, wrong]) == ["32 warps (8 x 9 bf16): differs"]


def test_unknown_parts_and_a_missing_gpu_are_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(["--rehearse", "--parts", "losess"])
    assert "losess: there are tests, agreement, losses" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path)])
    assert "--rehearse" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [[], ["-n", "2", "--max-worker-restart", "1"]], ids=["", "xdist"])
def test_outcomes_of_a_stopped_pytest_are_kept_with_the_reasons(tmp_path: Path, workers: list[str]) -> None:
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='needs two GPUs')\ndef test_skipped(): pass\n"
        "def test_stopped():\n    import os\n    os._exit(9)\n"
    )
    (tmp_path / "test_other.py").write_text("import no_such_package\n")
    outcomes = tmp_path / "outcomes.jsonl"
    options = [
        "-p",
        "benchmarks.gpu.outcomes",
        "--outcomes",
        str(outcomes),
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
    ]
    command_line = [
        sys.executable,
        "-m",
        "pytest",
        *options,
        "--continue-on-collection-errors",
        *workers,
        str(tmp_path),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    subprocess.run(command_line, cwd=ROOT, env=environment, **IN_SECONDS)
    case = suite.case_of("tests", REHEARSAL, outcomes, 1.0, "stopped at its limit of 75 s")
    failed = "2" if workers else "1"  # pytest-xdist outlives a test that ends its process
    assert (case.notes["passed"], case.notes["failed"], case.notes["skipped"]) == ("1", failed, "1")
    told = {name.rpartition("::")[2]: value for name, value in case.notes.items()}
    assert "one is not two" in told["test_bad"]
    assert "needs two GPUs" in told["skipped 1 times"]
    assert any("no_such_package" in value for value in told.values())
    assert told["pytest"] == "stopped at its limit of 75 s"
    assert case.rows[0].work == 1


def test_the_process_that_forks_the_others_does_not_look_for_the_device() -> None:
    modules = ", ".join(agreement.PRELOADED)
    watched = f"import torch; torch.cuda.is_available = torch._C._cuda_getDeviceCount = None; import {modules}"
    done = subprocess.run([sys.executable, "-c", watched], cwd=ROOT, **IN_SECONDS)
    assert done.returncode == 0, done.stderr


def test_the_tests_of_the_kernels_come_first_and_the_others_are_found_by_their_mark() -> None:
    assert set(suite.files("tests")) == {path for path in suite.KERNELS if (ROOT / path).exists()}
    rest = suite.files("other-tests")
    assert "tests/attention/test_candidates.py" in rest
    assert not set(rest) & set(suite.KERNELS)


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    arguments = ["-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path), "--parts", "tests,losses"]
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("tests: ")
        process.terminate()
        rest = process.stdout.read()
    assert process.returncode == 1
    assert "run: interrupted" in rest
    assert [case.suite for case in read(tmp_path / "rehearsal.json")] == ["gpu_tests"]
    assert not (tmp_path / "cache").exists()
