"""What benchmarks found, as JSON: a file per suite and kind of machine, a case per question, a row per way of doing it.

    benchmarks/results/<machine>/<suite>.json     {"suite": ..., "cases": [Case, ...]}

Each case carries where it was measured. Rows keep the seconds of every round, so that any ratio can be formed again.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.timing import Timing, summary

FOLDER = Path(__file__).parent / "results"
OURS, PEER, LIMIT = "ours", "peer", "limit"


@dataclass(frozen=True)
class Row:
    """One way. role: ours, peer or limit (what the machine itself can do). seconds: of each timed round. work: what the
    useful part of it is, in the case's unit. error: against fp64, relative L2, the largest of all outputs and
    gradients. extra_peak: bytes. tokens: that one call handles, where a rate in tokens is meant. reason: why there are
    no seconds, or no comparison."""

    way: str
    role: str
    seconds: list[float] = field(default_factory=list)
    work: float | None = None
    error: float | None = None
    extra_peak: float | None = None
    tokens: float | None = None
    reason: str | None = None

    @property
    def time(self) -> Timing:
        """Median and quartiles of the seconds."""
        return summary(self.seconds)

    @property
    def rate(self) -> float | None:
        """Work per second at the median."""
        return self.work / self.time.median if self.work and self.seconds else None


@dataclass(frozen=True)
class Case:
    """One question. name: unique in the suite. parameters: sizes and types. unit and formula: of the rows' work.
    subject: the row that the others are divided by. notes: findings that are not rows."""

    suite: str
    name: str
    parameters: dict[str, Any]
    unit: str
    formula: str
    subject: str
    rows: list[Row]
    provenance: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)

    def row(self, way: str) -> Row | None:
        """The row of a way, if it has one."""
        return next((row for row in self.rows if row.way == way), None)

    @property
    def peak_rate(self) -> float | None:
        """Best rate of the limits: what a share of the machine is a share of."""
        return max((row.rate for row in self.rows if row.role == LIMIT and row.rate), default=None)


def ratio(case: Case, way: str, base: str | None = None) -> Timing | None:
    """Seconds of a way over those of the base (the subject), of the same rounds: median and quartiles."""
    above, below = case.row(way), case.row(base or case.subject)
    if above is None or below is None or not above.seconds or len(above.seconds) != len(below.seconds):
        return None
    return summary([a / b for a, b in zip(above.seconds, below.seconds, strict=True)])


def case_from(values: dict[str, Any]) -> Case:
    """The inverse of dataclasses.asdict."""
    return Case(**{**values, "rows": [Row(**row) for row in values["rows"]]})


def read(path: Path) -> list[Case]:
    """Cases of a result file, or of all files of a folder.

    Raises ValueError where there is none, or one is not such a file.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = []
    for file in files:
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            if path.is_dir() and "cases" not in document:
                continue
            found += [case_from(values) for values in document["cases"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a result of these benchmarks: {error!r}") from error
    if not found:
        raise ValueError(f"{path} holds no results of these benchmarks")
    return found


def save(cases: Sequence[Case], folder: Path) -> list[Path]:
    """Write a file per suite; cases of another name that a file holds already stay."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for suite in dict.fromkeys(case.suite for case in cases):
        path = folder / f"{suite}.json"
        kept = {case.name: case for case in read(path)} if path.exists() else {}
        kept |= {case.name: case for case in cases if case.suite == suite}
        text = json.dumps({"suite": suite, "cases": [asdict(case) for case in kept.values()]}, indent=1)
        temporary = path.with_suffix(".json.new")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
        written.append(path)
    return written


def changes(old: Iterable[Case], new: Iterable[Case]) -> list[tuple[str, str, float, float | None]]:
    """(case, way of ours, new / old of its time, new / old of its peak) where both have them.

    Times are first divided by what the machine's speed has changed by, which is the geometric mean of new / old over
    the rows of the case that are not ours; so a slower or busier machine is not taken for a slower kernel.
    """
    before = {(case.suite, case.name): case for case in old}
    found = []
    for case in new:
        other = before.get((case.suite, case.name))
        if other is None or other.parameters != case.parameters:
            continue
        pairs = [(row, other.row(row.way)) for row in case.rows]
        speeds = {row.way: _slower(row, was) for row, was in pairs if was is not None and row.seconds and was.seconds}
        others = [math.log(speeds[row.way]) for row, _ in pairs if row.role != OURS and row.way in speeds]
        machine = math.exp(statistics.fmean(others)) if others else 1.0
        for row, was in pairs:
            if row.role == OURS and was is not None and (row.way in speeds or (row.extra_peak and was.extra_peak)):
                peak = row.extra_peak / was.extra_peak if row.extra_peak and was.extra_peak else None
                found.append((f"{case.suite}, {case.name}", row.way, speeds.get(row.way, machine) / machine, peak))
    return found


def _slower(row: Row, was: Row) -> float:
    return row.time.median / was.time.median
