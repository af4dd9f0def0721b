"""Measure the paper's claim: train methods with equal budgets on the embedded language model and compare them.

    python -m benchmarks.reproduce.language                 # trains and evaluates what is missing, writes the results
    python -m benchmarks.reproduce.language --seeds 0 1 2 --jobs 2 --out reproduce -- --steps 48

All methods share the default configuration and differ in the options of METHODS. PPO-Lagrangian is trained once more
with the mean cost that RePO reaches in training as its limit (--match). Each final policy answers all held-out prompts
with the same random numbers; the training scorers and the held-out judge score the answers, and a response is safe by
the same limit for all. Folders of finished runs are kept, so that an interrupted command continues; their checkpoints
are removed. Results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import machine
from repo.common.errors import UserError, exit_with_sentence
from repo.config.parse import make_parser, parse_config
from repo.evaluation.statistics import QUANTITIES, Evaluation
from repo.runs.folder import versions
from repo.training.multipliers import WINDOW

from . import matching
from .language_report import SHOWN, draw, markdown
from .methods import BASELINE, COMPARED, METHODS
from .over_seeds import of_seeds, within
from .runs import DEFAULT, RESULTS, evaluate, in_turn, is_trained, log_of, threads_of, train, write_results

SHARED = (DEFAULT, "--evaluation.prompts=0", "--save_every=0", "--sample_every=0")
"""Options of every run that leave the training as it is: final policies are evaluated afterwards, on all prompts."""
SAMPLES, EVALUATION_SEED = 4, 1000
MATCHED = "matched"


@dataclass(frozen=True)
class Experiment:
    """Runs to train and evaluate.

    seeds: of each method. out: folder of the runs. overrides: options that all methods share. jobs: runs at a time.
    """

    seeds: Sequence[int]
    out: Path
    overrides: Sequence[str]
    jobs: int
    made: dict[str, list[Path]] = field(default_factory=dict)
    """Runs of each method so far, in the order of seeds."""

    def shared(self) -> list[str]:
        """Return the options by which every policy is scored alike, whatever its method was trained with."""
        config = parse_config(make_parser("", ""), [*SHARED, *self.overrides])
        reward = config.scoring.reward
        return [
            f"--evaluation.samples_per_prompt={SAMPLES}",
            f"--seed={EVALUATION_SEED}",
            f"--algorithm.cost_limit={config.algorithm.cost_limit}",
            f"--scoring.reward={reward if isinstance(reward, str) else json.dumps(reward)}",
        ]

    def measure(self, methods: Mapping[str, Sequence[str]]) -> dict[str, list[Evaluation]]:
        """Train and evaluate what is missing.

        Args:
            methods: by the name of its runs the options of each method.

        Returns:
            By method, an evaluation for each seed.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        scored, runs = self.shared(), {name: [self.out / f"{name}-{s}" for s in self.seeds] for name in methods}
        tasks = {
            of_method[i].name: partial(self._one, of_method[i], [*methods[name], f"--seed={seed}"], scored)
            for i, seed in enumerate(self.seeds)
            for name, of_method in runs.items()
        }
        ready = {name for name in tasks if is_trained(self.out / name) and final_of(self.out / name).exists()}
        evaluations = in_turn(self.jobs, tasks, ready)
        self.made.update(runs)
        return {name: [evaluations[run.name] for run in of_method] for name, of_method in runs.items()}

    def _one(self, run: Path, options: Sequence[str], scored: Sequence[str]) -> Evaluation:
        """Train and evaluate one run, unless that is done."""
        threads = threads_of(self.jobs)
        train(run, [*SHARED, *self.overrides, *options], threads)
        return evaluate(run, final_of(run), log_of(run), scored, threads)

    def reference(self) -> Evaluation:
        """Evaluate the policy that every training starts from."""
        run = next(iter(self.made.values()))[0]
        options = [*self.shared(), "--checkpoint=reference"]
        return evaluate(run, self.out / "reference.json", self.out / "reference.log", options, None)

    def match(self, ours: Sequence[Evaluation], rounds: int) -> tuple[list[Evaluation], dict[str, Any]]:
        """Train PPO-Lagrangian with the mean cost that RePO reaches as its limit.

        Args:
            ours: evaluations of RePO's seeds. rounds: how often the limit is chosen.

        Returns:
            The evaluations of the last round, and how the limit was chosen and what came of it.
        """
        target, history, evaluations = matching.reached(self.made["repo"]), list[dict[str, float | None]](), []
        for number in range(1, rounds + 1):
            limit, name = matching.next_limit(target, history), f"{MATCHED}{number}"
            print(f"PPO-Lagrangian with the cost limit {limit:g}, for RePO's mean cost {target:.3f}", flush=True)
            options = [*METHODS[MATCHED].options, f"--algorithm.cost_limit={limit}"]
            evaluations = self.measure({name: options})[name]
            history.append({"limit": limit, "reached": matching.reached(self.made[name])})
        about = {"target": target, "responses": WINDOW, "rounds": history, **matching.compare(ours, evaluations)}
        return evaluations, about


def final_of(run: Path) -> Path:
    """Return the file of the evaluation of a run's final policy."""
    return run / "eval" / "final.json"


def analyse(evaluations: Mapping[str, Sequence[Evaluation]]) -> dict[str, Any]:
    """Compute every quantity of each method, and its difference from PPO-Lagrangian.

    Raises:
        UserError: if the evaluations are of different prompts.
    """
    if len({tuple(e.ids) for seeds in evaluations.values() for e in seeds}) > 1:
        raise UserError("--out: its evaluations are of different prompts; choose another folder")
    of_methods = {
        method: {key: of_seeds(e, key) for key in SHOWN if key in QUANTITIES and all(one.has(key) for one in e)}
        for method, e in evaluations.items()
    }
    summary: dict[str, Any] = {
        method: {
            key: {**within(key, seeds.interval), "seeds": seeds.values.tolist()} for key, seeds in quantities.items()
        }
        for method, quantities in of_methods.items()
    }
    against = {
        method: {
            key: seeds.minus(of_methods[BASELINE][key])
            for key, seeds in quantities.items()
            if key in of_methods[BASELINE]
        }
        for method, quantities in of_methods.items()
        if BASELINE in of_methods and method != BASELINE
    }
    return {"methods": summary, "against_ppo_lagrangian": against}


def minutes_of(runs: Iterable[Path]) -> float:
    """Return the minutes that all steps of the runs took."""
    total = 0.0
    for run in runs:
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            total += sum(value for key, value in json.loads(line).items() if key.startswith("seconds_"))
    return total / 60


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = [name for name in METHODS if name != MATCHED]
    parser.add_argument("--methods", nargs="+", choices=named, default=list(COMPARED), help="methods to train")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="seeds of each method")
    parser.add_argument(
        "--match",
        type=int,
        default=1,
        metavar="ROUNDS",
        help="train PPO-Lagrangian at the mean cost that RePO reaches; more than 1: correct its limit so often; 0: no",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; they share the cores")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("overrides", nargs="*", help="after --: fields of the configuration, the same for every method")
    options = parser.parse_args(argv)
    experiment = Experiment(options.seeds, options.out, options.overrides, options.jobs)
    evaluations = experiment.measure({name: METHODS[name].options for name in options.methods})
    matched = None
    if options.match and "repo" in evaluations:
        evaluations[MATCHED], matched = experiment.match(evaluations["repo"], options.match)
    first = next(iter(evaluations.values()))[0]
    results = {
        "command": "python -m benchmarks.reproduce.language " + " ".join(sys.argv[1:] if argv is None else argv),
        "machine": machine(),
        "minutes": minutes_of(run for runs in experiment.made.values() for run in runs),
        "jobs": options.jobs,
        "versions": versions(),
        "seeds": options.seeds,
        "prompts": len(first.ids),
        "samples": first.samples,
        "cost_limit": first.cost_limit,
        "matched": matched,
        **analyse({"reference": [experiment.reference()], **evaluations}),
    }
    write_results(options.results, "reproduce_language", results, markdown(results), draw(results))


if __name__ == "__main__":
    exit_with_sentence(main)
