"""Format the results of `make gpu` as Markdown: a table per part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.gpu.loop.table import loop_table
from benchmarks.harness.machine import told
from benchmarks.harness.results import LIMIT, Case, Row

BEST = 4  # launch forms that the table shows per width
PREFIX = "gpu_"


def page(cases: Sequence[Case], failures: Mapping[str, str]) -> str:
    """Return the whole page of a run. failures: parts that failed, with the reason."""
    if not cases:
        return "\n".join(["# No results", "", *_listed(failures)]) + "\n"
    where = cases[0].provenance
    parts = [f"# {where['processor']}", f"{told(where)}."]
    parts += [f"**{where['rehearsal']}**"] if "rehearsal" in where else []
    parts += ["\n".join(["Parts that failed:", "", *_listed(failures)])] if failures else []
    return "\n\n".join([*parts, *sections(cases)]) + "\n"


def sections(cases: Sequence[Case]) -> list[str]:
    """Return title and table of each part that has cases."""
    tables: dict[str, tuple[str, Callable[[Sequence[Case]], str]]] = {
        "tests": ("Tests that need a GPU", tests_table),
        "losses": ("Loss and gradient from logits: ms (share of the copy's rate)", losses_table),
        "loop": ("The training loop", loop_table),
        "call": ("The call: host ms in a loop (device ms, kernels launched)", call_table),
        "linear": ("From hidden states: ms (extra peak memory, GB)", linear_table),
        "forms": ("Launch forms of the fused kernel: ms (share of the copy's rate)", forms_table),
    }
    parts = []
    for name, (title, table) in tables.items():
        chosen = [case for case in cases if case.suite == PREFIX + name]
        if chosen:
            parts += [f"## {title}", table(chosen), *_remarks(chosen)]
    return parts


def tests_table(cases: Sequence[Case]) -> str:
    """Return what each run of pytest told."""
    lines = []
    for case in cases:
        lines.append(f"- {case.name}, {case.rows[0].seconds[0]:.0f} s, {', '.join(case.parameters['files'])}")
        lines += [f"  - {name}: {value}" for name, value in case.notes.items()]
    return "\n".join(lines)


def losses_table(cases: Sequence[Case]) -> str:
    """Return a row per size and a column per way; the ways that read the logits once have half the work."""
    return _table("N x V", [case.name for case in cases], cases, _milliseconds_and_share, by_case=True)


def call_table(cases: Sequence[Case]) -> str:
    """Return a row per way and a column per size."""

    def cell(case: Case, row: Row) -> str:
        more = f" ({1e3 * row.device_seconds:.3f}, {row.launches})" if row.device_seconds is not None else ""
        return f"{1e3 * row.time.median:.3f}{more}"

    return _table("", _ways(cases), cases, cell)


def linear_table(cases: Sequence[Case]) -> str:
    """Return a row per way and a column per head."""

    def cell(case: Case, row: Row) -> str:
        peak = f" ({row.extra_peak / 1e9:.1f})" if row.extra_peak is not None else ""
        return f"{1e3 * row.time.median:.1f}{peak}"

    return _table("", _ways(cases), cases, cell)


def forms_table(cases: Sequence[Case]) -> str:
    """Return a row per size: as launched, the best forms, and the copy's time for the same bytes."""
    lines = [_line(["N x V", "as launched", *(f"best {i + 1}" for i in range(BEST)), "forms timed", "copy"])]
    lines.append("|---" * (BEST + 4) + "|")
    for case in cases:
        timed = [row for row in case.rows if row.seconds and row.role != LIMIT]
        forms = sorted((r for r in timed if r.way != case.subject), key=lambda row: row.time.median)[:BEST]
        subject = case.row(case.subject)
        cells = [_milliseconds_and_share(case, subject) if subject and subject.seconds else ""]
        cells += [f"{row.way}: {_milliseconds_and_share(case, row)}" for row in forms]
        cells += [""] * (BEST + 1 - len(cells))
        work = next((row.work for row in timed if row.work), None)
        floor = f"{1e3 * work / case.peak_rate:.3f}" if work and case.peak_rate else ""
        lines.append(_line([case.name, *cells, str(len(timed)), floor]))
    return "\n".join(lines)


def _milliseconds_and_share(case: Case, row: Row) -> str:
    share = f" ({row.rate / case.peak_rate:.2f})" if row.rate and case.peak_rate and row.role != LIMIT else ""
    return f"{1e3 * row.time.median:.3f}{share}"


def _table(
    corner: str,
    names: Sequence[str],
    cases: Sequence[Case],
    cell: Callable[[Case, Row], str],
    by_case: bool = False,
) -> str:
    """Return the cells of all ways and cases; a row is a case if by_case, else a way."""
    ways = _ways(cases)

    def told_cell(case: Case, way: str) -> str:
        row = case.row(way)
        return cell(case, row) if row is not None and row.seconds else ""

    columns = ways if by_case else [case.name for case in cases]
    lines = [_line([corner, *columns]), "|---" * (1 + len(columns)) + "|"]
    for name in names:
        if by_case:
            case = next(case for case in cases if case.name == name)
            lines.append(_line([name, *(told_cell(case, way) for way in ways)]))
        else:
            lines.append(_line([name, *(told_cell(case, name) for case in cases)]))
    return "\n".join(lines)


def _ways(cases: Sequence[Case]) -> list[str]:
    """Return every way that was timed in one of the cases."""
    return list(dict.fromkeys(row.way for case in cases for row in case.rows if row.seconds))


def _remarks(cases: Sequence[Case]) -> list[str]:
    """Return the largest errors, the reasons of what was not timed, and the notes of the cases."""
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for case in cases:
        for row in case.rows:
            if row.error is not None and cases[0].suite != f"{PREFIX}forms":
                errors[row.way] = max(row.error, errors.get(row.way, 0.0))
            if row.reason and cases[0].suite != f"{PREFIX}tests":
                reasons[f"{row.way} ({case.name})"] = row.reason
    parts = []
    if errors:
        parts.append("Largest error against fp64: " + ", ".join(f"{w} {e:.0e}" for w, e in errors.items()) + ".")
    if reasons:
        parts.append("\n".join(_listed(_merged(reasons))))
    if cases[0].suite != f"{PREFIX}tests":
        parts += [f"{case.name}: {name}: {value}." for case in cases for name, value in case.notes.items()]
    return parts


def _merged(reasons: Mapping[str, str]) -> dict[str, str]:
    """Return one entry for all names that have the same reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return {f"{those[0]} and {len(those) - 1} more" if len(those) > 1 else those[0]: r for r, those in names.items()}


def _listed(values: Mapping[str, str]) -> list[str]:
    return [f"- {name}: {value}" for name, value in values.items()]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
