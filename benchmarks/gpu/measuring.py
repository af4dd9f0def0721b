"""Time the cases of a part one after the other; each is on disk as soon as it is measured."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu.agreement import Agreed, Finding
from benchmarks.gpu.plan import Plan
from benchmarks.harness import machine, memory, results
from benchmarks.harness.cases import Setup, Way, failure
from benchmarks.harness.process import Deadline
from benchmarks.harness.results import LIMIT, OURS, PEER, Case, Row
from benchmarks.harness.timing import Turns

MEANINGLESS = "a rehearsal on a CPU, not to be used"
DIGITS = 7  # of a second


def provenance(plan: Plan) -> dict[str, Any]:
    """Return where this is measured."""
    return machine.provenance() | ({"rehearsal": MEANINGLESS} if plan.rehearsal else {})


def measure(part: ModuleType, plan: Plan, folder: Path, deadline: Deadline, agreed: Agreed) -> None:
    """Measure every case of a part until its deadline, and write <folder>/gpu_<part>.json.

    part: a module with NAME, SUBJECT, PEAKS, `cases` and `setup`, and optionally a `clock` and `more`, which returns
    further fields of a row. agreed: what was found before about the agreement of its ways with fp64.

    Raises:
        RuntimeError: if the device can no longer be used; the cases before that are on disk.
    """
    timed, late = 0, []
    for name, parameters in part.cases(plan).items():
        if deadline.passed:
            late.append(name)
            continue
        case = Measurement(part, plan, name, parameters, agreed).run(deadline)
        results.save([case], folder)
        timed += sum(bool(row.seconds) for row in case.rows)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where a way broke the device's context
            torch.cuda.empty_cache()
    print(f"{timed} rows timed" + (f", no time for {', '.join(late)}" if late else ""), flush=True)


@dataclass
class Measurement:
    """One case of a part, before it is measured; the fields are those of `measure`."""

    part: ModuleType
    plan: Plan
    name: str
    parameters: dict[str, Any]
    agreed: Agreed

    def run(self, deadline: Deadline) -> Case:
        """Set up and measure the case. A setup that fails gives a case whose row tells why."""
        where = provenance(self.plan)
        about: dict[str, Any] = {"suite": f"gpu_{self.part.NAME}", "name": self.name, "parameters": self.parameters}
        torch._dynamo.reset()
        try:
            setup = self.part.setup(**self.parameters)
        except Exception as problem:
            row = Row(self.part.SUBJECT, OURS, reason=failure(problem))
            return Case(**about, unit="calls", formula="", subject=row.way, rows=[row], provenance=where)
        rows, rounds = self.rows(setup, deadline)
        if torch.cuda.is_available():
            where["gpu after"] = machine.gpu_state()
        about |= {"unit": setup.unit, "formula": setup.formula, "subject": setup.subject, "rows": rows}
        return Case(**about, provenance=where, notes=self.notes(setup, rounds))

    def rows(self, setup: Setup, deadline: Deadline) -> tuple[list[Row], int]:
        """Return a row for every way, timed, failed or absent, and the number of rounds."""
        absent = self.call_all(setup)
        calls = {name: way.call for name, way in setup.ways.items() if name not in absent}
        resets = {name: way.reset for name, way in setup.ways.items() if way.reset}
        clock = self.part.clock(self.plan) if hasattr(self.part, "clock") else None
        turns, rounds = Turns(calls, setup.subject, resets, clock), 0
        while rounds < self.plan.rounds[self.part.NAME] and not (rounds and deadline.passed):
            turns.time_others()
            turns.time_subject()
            rounds += 1
        rows = [Row(name, PEER, reason=why) for name, why in absent.items() if name not in setup.ways]
        timed = [self.row(name, way, turns.seconds.get(name), absent.get(name)) for name, way in setup.ways.items()]
        return timed + rows, rounds

    def call_all(self, setup: Setup) -> dict[str, str]:
        """Call every way once. Return the ways that cannot be timed, with the reason."""
        absent = dict(setup.absent)
        for name, way in setup.ways.items():
            reason = self.finding(name).reason
            try:
                if reason is None:
                    way.call()
            except Exception as problem:  # a failure is a row of the table
                reason = failure(problem)
            if reason is not None:
                absent[name] = reason
        return absent

    def row(self, name: str, way: Way, seconds: list[float] | None, reason: str | None) -> Row:
        """Return the row of a way, with its memory and further fields if it was timed and the part asks for them."""
        more: dict[str, Any] = {}
        if seconds and hasattr(self.part, "more"):
            more = self.part.more(way.call, self.plan)
        if seconds and self.part.PEAKS and way.role != LIMIT:
            more["extra_peak"] = memory.extra_peak(way.call)
        kept = [round(value, DIGITS) for value in seconds or []]
        return Row(name, way.role, kept, way.work, self.finding(name).error, reason=reason, **more)

    def finding(self, name: str) -> Finding:
        """Return what was found about a way, or an empty finding."""
        return self.agreed.get((self.part.NAME, self.name, name), Finding())

    def notes(self, setup: Setup, rounds: int) -> dict[str, str]:
        """Return what limits the case: fewer rounds than planned, and ways whose values were not compared."""
        compared = [name for name, way in setup.ways.items() if way.tolerance is not None]
        unchecked = [name for name in compared if self.finding(name) == Finding()]
        planned = self.plan.rounds[self.part.NAME]
        notes = {"rounds": f"{rounds} of {planned}"} if rounds < planned else {}
        return notes | ({"not compared with fp64": ", ".join(unchecked)} if unchecked else {})
