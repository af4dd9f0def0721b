"""Run the benchmarks in pytest: the options, and the fixtures that check, time and record a case."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.harness import allocator, machine, memory, results
from benchmarks.harness.cases import Setup, disagreement, failure
from benchmarks.harness.results import LIMIT, OURS, PEER, Case, Row
from benchmarks.harness.timing import Turns
from benchmarks.reporting.tables import case_table, changes_table
from benchmarks.workloads.models import GPU_MODELS
from repo.common.malloc import keep_freed_memory

QUICK = "left out by --quick"
WARMUPS = 2
DEFAULT = str(results.FOLDER / machine.slug())
CASES, OLD, CHANGES = (pytest.StashKey[list[Any]]() for _ in range(3))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of this repository")
    group.addoption("--quick", action="store_true", help="few rounds, small sizes, no compiled peers: under 2 minutes")
    group.addoption(
        "--save",
        nargs="?",
        const=DEFAULT,
        metavar="FOLDER",
        help="write results as JSON (default: the folder of this machine in benchmarks/results)",
    )
    group.addoption("--compare", action="append", default=[], metavar="OLD.json", help="results (or a folder of them)")
    group.addoption("--percent", type=float, default=10.0, help="slower or larger by more than this fails --compare")
    group.addoption("--rounds", type=int, help="timed rounds of every case (default: each suite's)")
    group.addoption("--no-peaks", action="store_true", help="do not measure memory, which takes a process for each way")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CASES] = []
    if config.getoption("--quick") and config.getoption("--save") == DEFAULT:
        raise pytest.UsageError("--save: needs a FOLDER with --quick, whose small sizes are not for committed results")
    if config.getoption("--save") and any(Path(config.getoption("--save")).glob("*.json")):
        try:
            results.read(Path(config.getoption("--save")))
        except ValueError as problem:
            raise pytest.UsageError(f"--save: {problem}") from None
    try:
        config.stash[OLD] = [case for name in config.getoption("--compare") for case in results.read(Path(name))]
    except ValueError as problem:
        raise pytest.UsageError(f"--compare: {problem}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.cases(metafunc.config.getoption("--quick"))
        marks = {name: [pytest.mark.gpu] if values.get("model") in GPU_MODELS else [] for name, values in cases.items()}
        parameters = [pytest.param((name, values), id=name, marks=marks[name]) for name, values in cases.items()]
        metafunc.parametrize("case", parameters)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """Return a function that keeps a case for the tables and writes it to the folder of --save."""
    folder = request.config.getoption("--save")

    def keep(case: Case) -> None:
        request.config.stash[CASES].append(case)
        if folder:
            results.save([case], Path(folder))

    return keep


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any, record: Callable[[Case], None]) -> Callable[..., Case]:
    """Return a function that measures a case of the test's module.

    pytest-benchmark times the subject; before each of its rounds the other ways are timed in turn.
    """
    config = request.config
    quick, module = config.getoption("--quick"), request.module

    def run(case: tuple[str, dict[str, Any]], rounds: int, warmups: int = WARMUPS) -> Case:
        name, parameters = case
        arguments = {key: value for key, value in parameters.items() if key != "allocator"}
        if parameters.get("allocator") != allocator.DEFAULT:
            keep_freed_memory()
        elif allocator.FRESH not in os.environ:
            asked = config.getoption("--rounds") or rounds
            (measured,) = benchmark.pedantic(in_fresh_process, args=(request.node.nodeid, asked), rounds=1)
            record(measured)
            return measured
        rounds = config.getoption("--rounds") or (min(rounds, 3) if quick else rounds)
        warmups = min(warmups, 1) if quick else warmups
        setup = module.setup(**arguments)
        absent = dict(setup.absent)
        if quick:
            absent |= {name: QUICK for name, way in setup.ways.items() if way.compiled or way.slow}
        torch._dynamo.reset()
        errors = checked(module, arguments, setup, absent)
        torch._dynamo.reset()  # so that ways are compiled for the sizes that are timed, not for any
        where = machine.provenance()
        calls = {name: way.call for name, way in setup.ways.items() if name not in absent}
        resets = {name: way.reset for name, way in setup.ways.items() if way.reset}
        turns = Turns(calls, setup.subject, resets)
        benchmark.pedantic(turns.time_subject, setup=turns.time_others, rounds=rounds, warmup_rounds=warmups)
        notes = setup.notes(rounds)
        if torch.cuda.is_available():
            where["gpu after"] = machine.gpu_state()
        rows = [
            Row(
                way=name_of_way,
                role=way.role,
                seconds=turns.seconds[name_of_way][warmups:] if name_of_way not in absent else [],
                work=way.work,
                error=errors.get(name_of_way),
                tokens=way.tokens,
                reason=absent.get(name_of_way),
            )
            for name_of_way, way in setup.ways.items()
        ]
        rows += [Row(way, PEER, reason=why) for way, why in absent.items() if way not in setup.ways]
        about = {"unit": setup.unit, "formula": setup.formula, "subject": setup.subject}
        del setup, turns, calls  # the processes that measure peaks need the memory
        free_memory()
        if not (quick or config.getoption("--no-peaks") or "allocator" in parameters):
            rows = [with_peak(module, arguments, row) for row in rows]
        suite = module.__name__.rpartition("bench_")[2]
        measured = Case(suite, name, parameters, rows=rows, provenance=where, notes=notes, **about)
        benchmark.extra_info["rows"] = [vars(row) for row in rows]
        record(measured)
        return measured

    return run


def in_fresh_process(test: str, rounds: int) -> list[Case]:
    """Measure a test in a pytest process of its own and return its cases."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", test, "--no-peaks", "--save", folder, "--rounds", str(rounds)]
        environment = {**os.environ, allocator.FRESH: "1"}
        done = subprocess.run(command, cwd=machine.ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return results.read(Path(folder))


def free_memory() -> None:
    """Free what the last case left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def checked(module: ModuleType, parameters: dict[str, Any], setup: Setup, absent: dict[str, str]) -> dict[str, float]:
    """Return the errors of the ways against fp64 on a small problem of the same kind.

    A peer that fails or is wrong is added to `absent` with the reason. AssertionError is raised if one of our ways is
    wrong.
    """
    if setup.expected is None:
        return {}
    small = module.setup(**{**parameters, **module.SMALL})
    expected, errors = small.expected() if small.expected else (), {}
    for name, way in small.ways.items():
        if way.tolerance is not None and name not in absent:
            try:
                errors[name], reason = disagreement(name, way, expected)
            except Exception as problem:  # a peer's failure is a row of the table
                if way.role == OURS:
                    raise
                absent[name] = failure(problem)
                continue
            if reason is not None:
                assert way.role != OURS, reason
                absent[name] = reason
    return errors


def with_peak(module: ModuleType, parameters: dict[str, Any], row: Row) -> Row:
    """Return the row with its extra peak memory, or with the reason why there is none."""
    if not row.seconds or row.role == LIMIT:
        return row
    own = getattr(module, "peak", None)  # a suite may define what "extra" is relative to
    peak = own(parameters, row.way) if own else memory.in_process(module.__name__, parameters, row.way)
    values = {"extra_peak": peak} if isinstance(peak, int) else {"reason": peak or None}
    return Row(**{**vars(row), **values})


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With --compare, fail a run in which a case became slower or larger."""
    config = session.config
    cases = config.stash.get(CASES, [])
    if config.getoption("--compare"):
        config.stash[CHANGES] = results.changes(config.stash[OLD], cases)
        most = 1 + config.getoption("--percent") / 100
        if not config.stash[CHANGES] or any(change.worst > most for change in config.stash[CHANGES]):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables."""
    cases = config.stash.get(CASES, [])
    if cases:
        terminalreporter.section("benchmarks")
        terminalreporter.write_line(machine.told(cases[0].provenance))
        for case in cases:
            terminalreporter.write_line(f"\n{case_table(case)}")
    if config.getoption("--save") and cases:
        terminalreporter.write_line(f"\nsaved in {config.getoption('--save')}")
    if config.getoption("--compare"):
        terminalreporter.section("compared with " + ", ".join(config.getoption("--compare")))
        terminalreporter.write_line(changes_table(config.stash[CHANGES], config.getoption("--percent")))
