"""The tests that need a GPU, as two parts: those of the kernels, then the others."""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path

from benchmarks.gpu.measuring import provenance
from benchmarks.gpu.plan import Plan
from benchmarks.harness.machine import ROOT, installed
from benchmarks.harness.results import OURS, Case, Row

PARTS = ("tests", "other-tests")
KERNELS = ["tests/kernels/backends/test_gpu.py", "tests/kernels/backends/test_gpu_call.py"]
SHOWN = 8  # failures whose message is told


def files(part: str) -> list[str]:
    """Return the test files of a part: the kernels', or all others that have tests marked gpu."""
    if part == "tests":
        return KERNELS
    paths = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py") if marked(path)]
    return sorted(set(paths) - set(KERNELS))


def marked(path: Path) -> bool:
    """Return whether a file has tests marked gpu."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return any(line.startswith(("@pytest.mark.gpu", "pytest.mark.gpu")) for line in lines)


def arguments(part: str, plan: Plan, outcomes: Path) -> list[str]:
    """Return the arguments of pytest for a part. outcomes: the file that gets a line per test."""
    options = ["-m", "gpu", "-p", "benchmarks.gpu.outcomes", "--outcomes", str(outcomes), "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors"]
    if installed("pytest-xdist") and not plan.rehearsal:
        options += ["-n", str(max(1, min(5, (os.cpu_count() or 1) // 3)))]
    return [*options, *files(part)]


def case_of(part: str, plan: Plan, outcomes: Path, seconds: float, reason: str | None) -> Case:
    """Return the case that tells counts, failures and reasons. reason: why pytest failed or was stopped, or None."""
    lines = [json.loads(line) for line in outcomes.read_text().splitlines()] if outcomes.exists() else []
    counts = collections.Counter(line["outcome"] for line in lines)
    notes = {name: str(counts[name]) for name in ("passed", "failed", "skipped", "not collected") if counts[name]}
    bad = [line for line in lines if line["outcome"] in ("failed", "not collected")]
    notes |= {line["test"]: line["message"] for line in bad[:SHOWN]}
    if len(bad) > SHOWN:
        notes["failed too"] = ", ".join(line["test"] for line in bad[SHOWN:])
    skips = collections.Counter(line["message"] for line in lines if line["outcome"] == "skipped")
    notes |= {f"skipped {count} times": why for why, count in skips.items()}
    if reason is not None:
        notes["pytest"] = reason
    row = Row("pytest -m gpu", OURS, [round(seconds, 1)], work=float(counts["passed"]), reason=reason)
    return Case(
        "gpu_tests", part, {"files": files(part)}, "tests", "Work: tests that passed", row.way, [row],
        provenance(plan), notes,
    )  # fmt: skip
