"""Results of benchmarks as JSON: a file per suite and kind of machine, a case per question, a row per way of doing it.

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

from benchmarks.harness.timing import Timing, summary

FOLDER = Path(__file__).parents[1] / "results"
OURS, PEER, LIMIT = "ours", "peer", "limit"
SMALL_PEAK = 8e6  # bytes


@dataclass(frozen=True)
class Row:
    """One way of doing the work of a case.

    role: ours, peer or limit (what the machine itself can do). seconds: of each timed round. work: the useful work of
    one call, in the case's unit. error: against fp64, relative L2, the largest over outputs and gradients. extra_peak:
    bytes. tokens: handled by one call, where the table shows a rate in tokens. reason: why there are no seconds, or no
    comparison. launches: kernels that one call starts on the device. device_seconds: what one call takes there where
    `seconds` are the host's, at the median.
    """

    way: str
    role: str
    seconds: list[float] = field(default_factory=list)
    work: float | None = None
    error: float | None = None
    extra_peak: float | None = None
    tokens: float | None = None
    reason: str | None = None
    launches: int | None = None
    device_seconds: float | None = None

    @property
    def time(self) -> Timing:
        """Return median and quartiles of the seconds."""
        return summary(self.seconds)

    @property
    def rate(self) -> float | None:
        """Return the work per second at the median."""
        return self.work / self.time.median if self.work and self.seconds else None


@dataclass(frozen=True)
class Case:
    """One question.

    name: unique in the suite. parameters: sizes and types. unit, formula: of the rows' work. subject: the row that the
    others are divided by. notes: findings that are not rows.
    """

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
        """Return the row of a way, or None."""
        return next((row for row in self.rows if row.way == way), None)

    @property
    def peak_rate(self) -> float | None:
        """Return the best rate of the limit rows, which shares of the machine refer to."""
        return max((row.rate for row in self.rows if row.role == LIMIT and row.rate), default=None)


def ratio(case: Case, way: str, base: str | None = None) -> Timing | None:
    """Divide the seconds of a way by those of the base (default: the subject), round by round.

    Returns median and quartiles, or None if one of the two has no seconds.
    """
    above, below = case.row(way), case.row(base or case.subject)
    if above is None or below is None or not above.seconds or len(above.seconds) != len(below.seconds):
        return None
    return summary([a / b for a, b in zip(above.seconds, below.seconds, strict=True)])


def case_from(values: dict[str, Any]) -> Case:
    """Build a case from the output of dataclasses.asdict."""
    return Case(**{**values, "rows": [Row(**row) for row in values["rows"]]})


def document_in(file: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        ValueError: if it cannot be read, or holds no object.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a result of these benchmarks: {error!r}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{file} is not a result of these benchmarks: no JSON object")
    return document


def holds_cases(folder: Path) -> bool:
    """Tell whether a folder holds results of these benchmarks; records of other kinds may lie beside it.

    Raises:
        ValueError: as document_in.
    """
    return any("cases" in document_in(file) for file in sorted(folder.glob("*.json")))


def read(path: Path) -> list[Case]:
    """Read the cases of a result file, or of all result files in a folder.

    Raises:
        ValueError: if there is no case, or a file is not a result of these benchmarks.
    """
    cases: list[Case] = []
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        document = document_in(file)
        if path.is_dir() and "cases" not in document:
            continue
        try:
            cases += [case_from(values) for values in document["cases"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a result of these benchmarks: {error!r}") from error
    if not cases:
        raise ValueError(f"{path} holds no results of these benchmarks")
    return cases


def save(cases: Sequence[Case], folder: Path) -> list[Path]:
    """Write a file per suite. A case replaces one of the same name in the file; the other cases there stay."""
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


@dataclass(frozen=True)
class Change:
    """How a row of ours changed between two runs.

    time, peak: new / old, the machine's speed taken out of the time; None where one of the two runs has no value.
    missing: the new run has the case, but not this row or its time.
    """

    case: str
    way: str
    time: float | None
    peak: float | None
    missing: bool = False

    @property
    def worst(self) -> float:
        """Return the larger of the two changes; infinite if the row is missing."""
        return math.inf if self.missing else max(self.time or 0.0, self.peak or 0.0)


def changes(old: Iterable[Case], new: Iterable[Case]) -> list[Change]:
    """Compare every row of ours in the cases that both runs have with the same parameters.

    Times are divided by the change of the machine's speed, which is the median of new / old over the rows of the case
    that are not ours; so a slower or busier machine is not taken for a slower kernel. If all rows are ours, times are
    not compared. Peaks that differ by less than SMALL_PEAK count as equal.
    """
    before = {(case.suite, case.name): case for case in old}
    compared = []
    for case in new:
        other = before.get((case.suite, case.name))
        if other is None or other.parameters != case.parameters:
            continue
        pairs = [(was, case.row(was.way)) for was in other.rows]
        others = [_slower(was, row) for was, row in pairs if was.role != OURS]
        speeds = [speed for speed in others if speed is not None]
        machine = statistics.median(speeds) if speeds else None
        for was, row in pairs:
            if was.role == OURS:
                slower = _slower(was, row)
                time = slower / machine if slower is not None and machine is not None else None
                missing = row is None or (bool(was.seconds) and not row.seconds)
                compared.append(Change(f"{case.suite}, {case.name}", was.way, time, _larger(was, row), missing))
    return compared


def _slower(was: Row, row: Row | None) -> float | None:
    return row.time.median / was.time.median if row is not None and row.seconds and was.seconds else None


def _larger(was: Row, row: Row | None) -> float | None:
    if row is None or row.extra_peak is None or was.extra_peak is None:
        return None
    if abs(row.extra_peak - was.extra_peak) < SMALL_PEAK:
        return 1.0
    return row.extra_peak / max(was.extra_peak, 1.0)
