"""The table of the loop: a line for each stage of a model, beside its goal and what it took before."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.loop.goals import DECODE, FIRST, FIRST_DECODE, GOALS, LEAVING, UPDATE, Goal
from benchmarks.harness.results import LIMIT, Case, Row

HEADER = ("model", "stage", "measured", "goal", "before, H200, torch 2.11")


def loop_table(cases: Sequence[Case]) -> str:
    """Return the lines of all models."""
    lines = [HEADER, ("---",) * len(HEADER)]
    for case in cases:
        for row in case.rows:
            if row.seconds and row.role != LIMIT:
                goal = GOALS.get(case.name, {}).get(row.way, Goal())
                lines.append((case.name, row.way, told(case, row), goal.goal, goal.before))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def told(case: Case, row: Row) -> str:
    """Return what was measured of a stage."""
    seconds = row.time.median
    parts = [f"{seconds:.3f} s"]
    if row.rate:
        share = f", {row.rate / case.peak_rate:.0%} of a matrix product" if case.peak_rate else ""
        parts.append(f"{row.rate / 1e12:.0f} TFLOP/s{share}")
    if row.way in (DECODE, FIRST_DECODE):
        parts.append(f"{1e3 * seconds / case.parameters['decoded tokens']:.2f} ms a step")
    if row.tokens and row.way in (DECODE, LEAVING):
        parts.append(f"{row.tokens / seconds:.0f} tokens/s")
    later = case.row(UPDATE)
    if row.way == FIRST and later is not None and later.seconds:
        parts.append(f"{seconds / later.time.median:.1f} x the median")
    return ", ".join(parts)
