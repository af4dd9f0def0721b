"""Compare every way with fp64 before any is timed, in many processes, which also fills the compilers' caches.

A way that crashes its process, breaks the device or takes too long costs itself only: another process does the rest.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu.plan import PLANS, Plan
from benchmarks.gpu.rehearsal import rehearse
from benchmarks.harness.cases import disagreement, failure
from benchmarks.harness.process import Deadline

LONGEST = 45.0  # seconds for one way
WAYS_PER_JOB = 4
PRELOADED = ["benchmarks.gpu.losses", "benchmarks.gpu.linear"]
PEERS = ["liger_kernel.transformers.grpo_loss", "trl.trainer.utils"]  # they look for the device when imported
BROKEN = 3  # exit status of a process whose device can no longer be used


@dataclass(frozen=True)
class Finding:
    """What was found about a way: its error against fp64, and why it must not be timed."""

    error: float | None = None
    reason: str | None = None


Agreed = dict[tuple[str, str, str], Finding]  # (part, case, way) -> finding


@dataclass(frozen=True)
class Job:
    """Ways of a part that one process checks, as (case, way)."""

    module: str
    part: str
    plan: str
    pairs: tuple[tuple[str, str], ...]


def jobs(parts: Sequence[ModuleType], plan: Plan) -> list[Job]:
    """Divide all ways among jobs, the most important part first; what torch.compile compiles is a job of its own."""
    listed = []
    name = next(name for name, known in PLANS.items() if known is plan)
    for part in parts:
        setups = {case: part.setup(**part.small(values, plan)) for case, values in part.cases(plan).items()}
        order = list(next(iter(setups.values())).ways)
        compiled = {(case, way) for case, setup in setups.items() for way, one in setup.ways.items() if one.compiled}
        pairs = [(case, way) for case, setup in setups.items() for way in setup.ways if (case, way) not in compiled]
        size = WAYS_PER_JOB
        if getattr(part, "SAME_CODE", False):  # one kernel serves all cases, which are therefore kept together
            pairs.sort(key=lambda pair: order.index(pair[1]))
            size *= len(setups)
        groups = [*((pair,) for pair in compiled), *(tuple(pairs[i : i + size]) for i in range(0, len(pairs), size))]
        listed += [Job(part.__name__, part.NAME, name, group) for group in groups]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return listed


def serve(pipe: Any) -> None:
    """Do jobs that come through the pipe: send (case, way, finding) for each way, None after each job."""
    while True:
        job = pipe.recv()
        part, plan = importlib.import_module(job.module), PLANS[job.plan]
        rehearse(plan, job.part)
        cases, setups, expected = part.cases(plan), dict[str, Any](), dict[str, Any]()
        for case, way in job.pairs:
            if case not in setups:
                setups[case] = part.setup(**part.small(cases[case], plan))
                expected[case] = setups[case].expected() if setups[case].expected else ()
            found = finding(part, cases[case], setups[case].ways[way], way, expected[case])
            pipe.send((case, way, found))
            if torch.cuda.is_available():
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except RuntimeError:
                    sys.exit(BROKEN)
        setups.clear()
        expected.clear()
        pipe.send(None)


def finding(part: ModuleType, parameters: dict[str, Any], way: Any, name: str, expected: Any) -> Finding:
    """Compare a way with fp64; call one that torch.compile compiles at the sizes that are timed, too."""
    found = Finding()
    try:
        if way.tolerance is None:
            way.call()
        else:
            found = Finding(*disagreement(name, way, expected))
        if way.compiled:
            part.setup(**parameters).ways[name].call()
    except torch.OutOfMemoryError:  # other processes need the memory now, which says nothing about the way
        return found
    except Exception as problem:
        return Finding(reason=failure(problem))
    return found


class Worker:
    """A process that does one job after the other, seen from the process that gives it jobs."""

    def __init__(self, context: Any) -> None:
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.job: Job | None = None
        self.left: list[tuple[str, str]] = []
        self.deadline = Deadline.in_seconds(LONGEST)

    def give(self, job: Job) -> None:
        """Start a job."""
        self.job, self.left, self.deadline = job, list(job.pairs), Deadline.in_seconds(LONGEST)
        self.pipe.send(job)

    def collect(self, agreed: Agreed) -> None:
        """Add what was found since the last time."""
        try:
            while self.job and self.pipe.poll():
                message = self.pipe.recv()
                if message is None:
                    self.job = None
                    return
                case, way, found = message
                agreed[self.job.part, case, way] = found
                self.left.remove((case, way))
                self.deadline = Deadline.in_seconds(LONGEST)
        except (EOFError, ConnectionError):
            self.process.join()

    def lost(self, agreed: Agreed) -> Job | None:
        """Return None while all is well. Else note why the process ended and return a job for what it left."""
        late = self.deadline.passed and self.process.is_alive()
        if self.job is None or (self.process.is_alive() and not late):
            return None
        self.process.kill()
        self.process.join()
        if self.process.exitcode != BROKEN and self.left:
            how = f"took more than {LONGEST:.0f} s" if late else f"exit status {self.process.exitcode}"
            agreed[self.job.part, *self.left.pop(0)] = Finding(reason=f"fails: its process ended, {how}")
        return Job(self.job.module, self.job.part, self.job.plan, tuple(self.left))


def check(parts: Sequence[ModuleType], plan: Plan, file: Path, deadline: Deadline) -> None:
    """Check all ways of the parts until the deadline, and keep the findings in the file as they come."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED + PEERS * plan.rehearsal)
    pending, agreed = jobs(parts, plan), Agreed()
    workers = [Worker(context) for _ in range(max(2, (os.cpu_count() or 2) * 5 // 8))]
    while (pending or any(worker.job for worker in workers)) and not deadline.passed:
        before = len(agreed)
        for i, worker in enumerate(workers):
            worker.collect(agreed)
            rest = worker.lost(agreed)
            if rest is not None:
                pending += [rest] if rest.pairs else []
                workers[i] = Worker(context)
            elif worker.job is None and pending:
                worker.give(pending.pop(0))
        if len(agreed) > before:
            write(agreed, file)
        time.sleep(0.02)
    for worker in workers:
        worker.process.kill()
    wrong = sum(found.reason is not None for found in agreed.values())
    left = sum(len(job.pairs) for job in pending) + sum(len(worker.left) for worker in workers)
    print(f"{len(agreed)} ways checked, {wrong} of them fail or differ, {left} not reached", flush=True)


def write(agreed: Agreed, file: Path) -> None:
    """Write the findings as lines of JSON, in place of those that the file holds."""
    lines = [json.dumps([*key, found.error, found.reason]) + "\n" for key, found in agreed.items()]
    temporary = file.with_suffix(".new")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(file)


def read(file: Path) -> Agreed:
    """Read the findings; none if there is no file."""
    if not file.exists():
        return {}
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {(part, case, way): Finding(error, reason) for part, case, way, error, reason in entries}
