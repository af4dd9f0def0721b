"""Time the cases of a part one after the other; each is on disk as soon as it is measured."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu.agreement import Agreed
from benchmarks.gpu.plan import Plan
from benchmarks.harness import machine, memory, results
from benchmarks.harness.cases import Setup, failure
from benchmarks.harness.process import Deadline
from benchmarks.harness.results import LIMIT, OURS, PEER, Case, Row
from benchmarks.harness.timing import Turns

MEANINGLESS = "a rehearsal on a CPU, not to be used"
DETAILS = 7  # digits of a second that are kept


def measure(part: ModuleType, plan: Plan, folder: Path, deadline: Deadline, agreed: Agreed) -> None:
    """Measure every case of a part until its deadline, and write <folder>/<part>.json.

    part: a module with NAME, SUBJECT, PEAKS, `cases` and `setup`, and optionally a `clock` and `more` fields of a row. agreed: what
    was found before about the agreement of its ways with fp64.

    Raises:
        RuntimeError: if the device can no longer be used; the cases before that are on disk.
    """
    timed, late = 0, []
    for name, parameters in part.cases(plan).items():
        if deadline.passed:
            late.append(name)
            continue
        try:
            setup = part.setup(**parameters)
            case = measured_case(part, plan, name, parameters, setup, deadline, agreed)
            del setup
        except Exception as problem:
            row = Row(part.SUBJECT, OURS, reason=failure(problem))
            about = {"unit": "calls", "formula": "", "subject": part.SUBJECT}
            case = Case(f"gpu_{part.NAME}", name, parameters, rows=[row], provenance=provenance(plan), **about)
        results.save([case], folder)
        timed += sum(bool(row.seconds) for row in case.rows)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where an earlier way broke the device's context
            torch.cuda.empty_cache()
    print(f"{timed} rows timed" + (f", no time for {', '.join(late)}" if late else ""), flush=True)


def provenance(plan: Plan) -> dict[str, Any]:
    """Return where this is measured."""
    return machine.provenance() | ({"rehearsal": MEANINGLESS} if plan.rehearsal else {})


def first_calls(setup: Setup, name: str, case: str, agreed: Agreed) -> dict[str, str]:
    """Call every way once. Return the ways that are not timed, with the reason."""
    absent = dict(setup.absent)
    for way in setup.ways:
        found = agreed.get((name, case, way))
        if found is not None and found.reason is not None:
            absent[way] = found.reason
            continue
        try:
            setup.ways[way].call()
        except Exception as problem:  # a failure is a row of the table
            absent[way] = failure(problem)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return absent


def measured_case(
    part: ModuleType,
    plan: Plan,
    name: str,
    parameters: dict[str, Any],
    setup: Setup,
    deadline: Deadline,
    agreed: Agreed,
) -> Case:
    """Time the ways of a case in turns, count launches and measure memory where the part asks for it."""
    where, rounds = provenance(plan), plan.rounds[part.NAME]
    torch._dynamo.reset()
    absent = first_calls(setup, part.NAME, name, agreed)
    calls = {way: one.call for way, one in setup.ways.items() if way not in absent}
    resets = {way: one.reset for way, one in setup.ways.items() if one.reset}
    clock: Callable[..., float] | None = getattr(part, "clock", None)
    turns = Turns(calls, setup.subject, resets, clock(plan) if clock else None)
    done = 0
    while done < rounds and not (done and deadline.passed):
        turns.time_others()
        turns.time_subject()
        done += 1
    more = {way: part.more(call) for way, call in calls.items()} if hasattr(part, "more") else {}
    peaks = {way: memory.extra_peak(call) for way, call in calls.items()} if part.PEAKS else {}
    if torch.cuda.is_available():
        where["gpu after"] = machine.gpu_state()
    rows = []
    for way, one in setup.ways.items():
        found = agreed.get((part.NAME, name, way))
        rows.append(
            Row(
                way, one.role, [round(s, DETAILS) for s in turns.seconds.get(way, [])], one.work,
                found.error if found else None, peaks.get(way) if one.role != LIMIT else None,
                reason=absent.get(way), launches=counts.get(way),
            )
        )  # fmt: skip
    rows += [Row(way, PEER, reason=why) for way, why in absent.items() if way not in setup.ways]
    unchecked = [w for w, one in setup.ways.items() if one.tolerance and (part.NAME, name, w) not in agreed]
    notes = {"rounds": f"{done} of {rounds}"} if done < rounds else {}
    notes |= {"not compared with fp64": ", ".join(unchecked)} if unchecked else {}
    about = {"unit": setup.unit, "formula": setup.formula, "subject": setup.subject}
    return Case(f"gpu_{part.NAME}", name, parameters, rows=rows, provenance=where, notes=notes, **about)
