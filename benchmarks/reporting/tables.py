"""Format results as Markdown: a table per case, and one of the changes since an earlier run."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.results import Case, Change, Row, ratio

SCALES = {
    "bytes": ("GB/s", 1e9),
    "operations": ("GFLOP/s", 1e9),
    "samples": ("samples/h", 1 / 3600),
    "steps": ("steps/h", 1 / 3600),
    "tests": ("tests/s", 1.0),
    "calls": ("calls/s", 1.0),
}


def milliseconds(row: Row) -> str:
    """Format median and quartiles, in ms below a second, else in s."""
    time = row.time
    scale, unit, form = (1e3, "ms", ".1f") if time.median < 1 else (1.0, "s", ".2f")
    return f"{scale * time.median:{form}} [{scale * time.low:{form}}, {scale * time.high:{form}}] {unit}"


def case_table(case: Case) -> str:
    """Return one row per way: time, ratio to the subject, rate, share of the machine's limit, error, peak memory."""
    unit, scale = SCALES[case.unit]
    rated = any(row.rate for row in case.rows)
    told = any(row.tokens for row in case.rows)
    columns = ["", "median [quartiles]", f"÷ {case.subject}"]
    columns += [unit, "of the limit"] if rated else []
    columns += ["tokens/s"] if told else []
    columns += ["launches"] if any(row.launches for row in case.rows) else []
    columns += ["error to fp64", "extra peak MB"]
    lines = [f"**{case.suite}: {case.name}.** {case.formula}", "", _line(columns), "|---" * len(columns) + "|"]
    for row in case.rows:
        if not row.seconds and row.extra_peak is None:
            continue
        cells = [row.way, *_times(case, row)]
        if rated:
            share = f"{row.rate / case.peak_rate:.0%}" if row.rate and case.peak_rate else ""
            cells += [f"{row.rate / scale:.1f}" if row.rate else "", share]
        if told:
            cells.append(f"{row.tokens / row.time.median:.0f}" if row.tokens and row.seconds else "")
        if "launches" in columns:
            cells.append(f"{row.launches}" if row.launches else "")
        cells.append(f"{row.error:.1e}" if row.error is not None else "")
        cells.append(f"{row.extra_peak / 1e6:.0f}" if row.extra_peak is not None else "")
        lines.append(_line(cells))
    lines += ["", *(f"{row.way}: {row.reason}." for row in case.rows if row.reason)]
    lines += [f"{name}: {value}." for name, value in case.notes.items()]
    return "\n".join(lines).rstrip()


def _times(case: Case, row: Row) -> list[str]:
    if not row.seconds:
        return ["", ""]
    quotient = ratio(case, row.way)
    if quotient is None:
        return [milliseconds(row), ""]
    return [milliseconds(row), f"{quotient.median:.2f} [{quotient.low:.2f}, {quotient.high:.2f}]"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def changes_table(changes: Sequence[Change], percent: float) -> str:
    """Return what changed, the worst first, marking what is worse by more than `percent`."""
    if not changes:
        return "Nothing to compare: no case with the same name and parameters has a row of ours in both."
    lines = [_line(["case", "way", "time, new ÷ old, machine's speed taken out", "peak, new ÷ old", ""])]
    lines.append("|---" * 5 + "|")
    for change in sorted(changes, key=lambda change: -change.worst):
        told = [f"{value:.3f}" if value is not None else "" for value in (change.time, change.peak)]
        worse = 100 * (change.worst - 1)
        verdict = f"**{worse:.0f} % worse, more than {percent:g} %**" if worse > percent else ""
        lines.append(_line([change.case, change.way, *told, "**missing**" if change.missing else verdict]))
    return "\n".join(lines)
