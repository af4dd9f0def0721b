"""Run the default configuration with several seeds and check what must hold of it: `make seeds`.

    python -m benchmarks.reproduce.seeds                    # ten seeds, one at a time, so that minutes mean something
    python -m benchmarks.reproduce.seeds --seeds 0 1 2 --jobs 2 --out seeds --results seeds -- --steps 24

Nothing is evaluated besides: the numbers are those that each run prints at its end, of the evaluations before and after
training. Folders of finished runs are kept, so that an interrupted command continues; their checkpoints are removed.
Results go to benchmarks/results/default_seeds.{json,md,png}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import machine
from repo.common.errors import UserError, exit_with_sentence
from repo.evaluation.comparison import read_evaluation
from repo.evaluation.statistics import Evaluation
from repo.runs.folder import versions

from .criteria import check
from .runs import DEFAULT, RESULTS, in_turn, is_trained, threads_of, train, usage_of, write_results
from .seed_changes import SeedRun, summary
from .seeds_report import draw, markdown


def read_run(run: Path, seed: int) -> SeedRun:
    """Read the evaluations and the usage of a finished run.

    Raises:
        UserError: if the run has no evaluations.
    """
    before, after = (_evaluation(run, name) for name in ("before", "after"))
    return SeedRun(seed, before, after, usage_of(run))


def _evaluation(run: Path, name: str) -> Evaluation:
    file = run / "eval" / f"{name}.json"
    if not file.is_file():
        raise UserError(f"{file} is missing; evaluation.prompts must not be 0")
    return read_evaluation(file)[0]


def measure(seeds: Sequence[int], out: Path, overrides: Sequence[str], jobs: int) -> list[SeedRun]:
    """Train what is missing, `jobs` runs at a time, and read all runs in the order of `seeds`."""
    out.mkdir(parents=True, exist_ok=True)
    runs = {f"seed-{seed}": seed for seed in seeds}
    tasks = {
        name: partial(train, out / name, [DEFAULT, *overrides, f"--seed={seed}"], threads_of(jobs))
        for name, seed in runs.items()
    }
    in_turn(jobs, tasks, {name for name in tasks if is_trained(out / name)})
    return [read_run(out / name, seed) for name, seed in runs.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)), help="seeds to run")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at the same time; they share the cores, so minutes say nothing above 1",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("overrides", nargs="*", help="after --: fields of the configuration")
    options = parser.parse_args(argv)
    runs = measure(options.seeds, options.out, options.overrides, options.jobs)
    found = summary(runs)
    results: dict[str, Any] = {
        "command": "python -m benchmarks.reproduce.seeds " + " ".join(sys.argv[1:] if argv is None else argv),
        "machine": machine(),
        "versions": versions(),
        "jobs": options.jobs,
        "prompts": len(runs[0].after.ids),
        "samples": runs[0].after.samples,
        **found,
        "criteria": check(found, options.jobs),
    }
    write_results(options.results, "default_seeds", results, markdown(results), draw(results))


if __name__ == "__main__":
    exit_with_sentence(main)
