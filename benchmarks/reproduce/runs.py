"""Runs of an experiment: train and evaluate what is missing, several at a time, with the time that is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure

from repo.common.errors import UserError
from repo.config.parse import PRESETS, load_config, make_parser, parse_config
from repo.evaluation.comparison import read_evaluation
from repo.evaluation.statistics import Evaluation
from repo.runs.json_lines import finite

T = TypeVar("T")
RESULTS = Path(__file__).parents[1] / "results"
"""Folder of the committed results."""
DEFAULT = f"--config={PRESETS / 'embedded.yaml'}"
"""The default run, as an option of repo.train."""


@dataclass(frozen=True)
class Usage:
    """What a command took. minutes: wall time. bytes: largest resident memory of its process."""

    minutes: float
    bytes: int


def call(arguments: Sequence[str], threads: int | None, log: Path) -> Usage:
    """Run a command of the package and append its output to `log`.

    Args:
        arguments: module and arguments, as after `python -m`. threads: OMP_NUM_THREADS; None leaves it as it is.

    Raises:
        RuntimeError: if the command fails, with the end of the log.
    """
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)  # Popen.wait tells nothing of memory
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed; the end of {log}: {log.read_text(encoding='utf-8')[-500:]}")
    return Usage((time.monotonic() - started) / 60, used.ru_maxrss * 1024)


def usage_of(run: Path) -> Usage | None:
    """Return what the training of a run took over all its starts; None if it is not known."""
    file = _usage_file(run)
    return Usage(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _usage_file(run: Path) -> Path:
    return run.with_name(f"{run.name}.usage.json")


def is_trained(run: Path) -> bool:
    """Tell whether a run is finished."""
    return (run / "final").is_dir()


def train(run: Path, options: Sequence[str], threads: int | None) -> None:
    """Train a run, or resume it if its folder is there; then remove its checkpoints (1.6 GB each).

    Args:
        run: its folder, beside which its log and its usage are written. options: of repo.train, without --out.

    Raises:
        UserError: if the run was trained with another configuration.
        RuntimeError: if the training fails or is stopped before its end.
    """
    options, begun = [*options, f"--out={run}"], (run / "config.yaml").is_file()
    if begun:
        wanted, there = parse_config(make_parser("", ""), options), load_config(run / "config.yaml")
        date = wanted.data.date or there.data.date  # of the day on which the run began
        if replace(wanted, out=there.out, data=replace(wanted.data, date=date)) != there:
            raise UserError(f"--out: {run} was trained with another configuration; choose another folder")
        options = ["--resume", str(run)]
    if not is_trained(run):
        used, before = call(["repo.train", *options], threads, log_of(run)), usage_of(run) if begun else None
        if before:
            used = Usage(before.minutes + used.minutes, max(before.bytes, used.bytes))
        if not begun or before:  # of a run that was begun elsewhere, only a part would be known
            _usage_file(run).write_text(json.dumps(asdict(used)), encoding="utf-8")
        if not is_trained(run):
            raise RuntimeError(f"{run} was stopped before its end; the same command continues it")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def evaluate(target: Path, file: Path, log: Path, options: Sequence[str], threads: int | None) -> Evaluation:
    """Return the evaluation of a run; make it if its file is missing.

    Args:
        target: the run. file: of the evaluation. log: gets the command's output. options: of repo.evaluate.
    """
    if not file.exists():
        call(["repo.evaluate", str(target), f"--out={file}", *options], threads, log)
    return read_evaluation(file)[0]


def in_turn(jobs: int, tasks: Mapping[str, Callable[[], T]], ready: Collection[str] = ()) -> dict[str, T]:
    """Do tasks, `jobs` at a time, and print when each begins and ends and how much time the others will take.

    After the first failure or an interrupt no other task begins.

    Args:
        tasks: by name. ready: names of tasks that only read what is there, which the estimate leaves out.

    Returns:
        The results by name.
    """
    many, started, done = sum(name not in ready for name in tasks), time.monotonic(), 0
    print(f"{len(tasks)} runs, {len(tasks) - many} there already; {jobs} at a time", flush=True)

    def one(name: str) -> T:
        nonlocal done
        if name in ready:
            return tasks[name]()
        begun = time.monotonic()
        print(f"{name}: begins", flush=True)
        result, now = tasks[name](), time.monotonic()
        done += 1
        rest = (now - started) / done * (many - done) / 60
        print(f"{name}: {(now - begun) / 60:.1f} min; {done} of {many} done, {_duration(rest)} left", flush=True)
        return result

    pool = ThreadPoolExecutor(jobs)
    try:
        return dict(zip(tasks, pool.map(one, tasks), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _duration(minutes: float) -> str:
    """Write a duration as hours and minutes."""
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest:02d} min" if hours else f"{rest} min"


def log_of(run: Path) -> Path:
    """Return the file with the output of a run's commands."""
    return run.with_name(f"{run.name}.log")


def threads_of(jobs: int) -> int | None:
    """Return how many threads each of several runs gets; None, which is all cores, for a single one."""
    return None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)


def write_results(folder: Path, name: str, results: Mapping[str, Any], text: str, figure: Figure) -> None:
    """Write what the runs gave as folder/name.json, .md and .png, and print the text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(finite(results), indent=1), encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=144)
    print(text)
