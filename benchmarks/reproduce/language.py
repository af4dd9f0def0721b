"""Measure the paper's claim: train methods with equal budgets on the embedded language model and compare them.

    python -m benchmarks.reproduce.language                 # trains and evaluates what is missing, writes the results
    python -m benchmarks.reproduce.language --seeds 0 1 2 --jobs 2 --out reproduce -- --steps 48
    python -m benchmarks.reproduce.language --neighbours    # RePO beside other answers to the same question

All methods share the default configuration and differ in the options of METHODS. PPO-Lagrangian is trained once more
with the mean cost that RePO reaches in training as its limit (--match). Each final policy answers all held-out prompts
with the same random numbers; the training scorers and the held-out judge score the answers, and a response is safe by
the same limit for all. Folders of finished runs are kept, so that an interrupted command continues; their checkpoints
are removed. What the results need of a run lies in --records as well, and a run that has its record there is not
trained again: a comparison can go on where its folders are not. Results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.machine import machine
from repo.common.errors import UserError, exit_with_sentence
from repo.config.parse import make_parser, parse_config
from repo.evaluation.kinds import KINDS, kinds_of
from repo.evaluation.kinds import SHOWN as SHOWN_OF_KIND
from repo.evaluation.statistics import QUANTITIES, Evaluation
from repo.runs.folder import versions
from repo.training.multipliers import WINDOW

from . import matching
from .language_report import SHOWN, UNSAFE, draw, markdown
from .methods import BASELINE, COMPARED, METHODS, NEIGHBOURS, OURS
from .over_seeds import Seeds, of_seeds, within
from .records import Record
from .runs import DEFAULT, RESULTS, evaluate, in_turn, is_trained, log_of, threads_of, train, write_results

SHARED = (DEFAULT, "--evaluation.prompts=0", "--save_every=0", "--sample_every=0")
"""Options of every run that leave the training as it is: final policies are evaluated afterwards, on all prompts."""
SAMPLES, EVALUATION_SEED = 4, 1000
MATCHED = "matched"


@dataclass(frozen=True)
class Experiment:
    """Runs to train and evaluate.

    seeds: of each method. out: folder of the runs. records: folder of their records. overrides: options that all
    methods share. jobs: runs at a time.
    """

    seeds: Sequence[int]
    out: Path
    records: Path
    overrides: Sequence[str]
    jobs: int

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

    def measure(self, methods: Mapping[str, Sequence[str]]) -> dict[str, list[Record]]:
        """Train and evaluate what is missing.

        Args:
            methods: by the name of its runs the options of each method.

        Returns:
            By method, the record of each seed.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        scored = self.shared()
        tasks = {
            f"{name}-{seed}": partial(self._one, f"{name}-{seed}", [*methods[name], f"--seed={seed}"], scored)
            for seed in self.seeds
            for name in methods
        }
        ready = {
            name
            for name in tasks
            if self._file(name).exists() or (is_trained(self.out / name) and final_of(self.out / name).exists())
        }
        records = in_turn(self.jobs, tasks, ready)
        return {name: [records[f"{name}-{seed}"] for seed in self.seeds] for name in methods}

    def _file(self, name: str) -> Path:
        """Return the file of a record."""
        return self.records / f"{name}.json"

    def _one(self, name: str, options: Sequence[str], scored: Sequence[str]) -> Record:
        """Train, evaluate and record one run, unless that is done."""
        run, file, threads = self.out / name, self._file(name), threads_of(self.jobs)
        options = [*SHARED, *self.overrides, *options]
        if not file.exists():
            train(run, options, threads)
            Record.of(run, scored, evaluate(run, final_of(run), log_of(run), scored, threads)).write(file)
        record = Record.read(file)
        record.require(file, options, scored)
        return record

    def reference(self) -> Record:
        """Evaluate the policy that every training starts from."""
        file, scored = self._file("reference"), [*self.shared(), "--checkpoint=reference"]
        if not file.exists():
            run = next((path.parent for path in sorted(self.out.glob("*-*/config.yaml"))), None)
            if run is None:
                raise UserError(f"--out: {self.out} has no run, by whose folder the reference policy is evaluated")
            evaluation = evaluate(run, self.out / "reference.evaluation.json", self.out / "reference.log", scored, None)
            Record.of(run, scored, evaluation).write(file)
        return Record.read(file)

    def match(self, ours: Sequence[Record], rounds: int) -> tuple[list[list[Record]], dict[str, Any]]:
        """Train PPO-Lagrangian with the mean cost that RePO reaches as its limit.

        Args:
            ours: records of RePO's seeds. rounds: how often the limit is chosen.

        Returns:
            The records of each round, and how the limit was chosen and what came of it in the last.
        """
        target, history, made = mean_reached(ours), list[dict[str, float | None]](), list[list[Record]]()
        for number in range(1, rounds + 1):
            limit, name = matching.next_limit(target, history), f"{MATCHED}{number}"
            print(f"PPO-Lagrangian with the cost limit {limit:g}, for RePO's mean cost {target:.3f}", flush=True)
            options = [*METHODS[MATCHED].options, f"--algorithm.cost_limit={limit}"]
            made.append(self.measure({name: options})[name])
            history.append({"limit": limit, "reached": mean_reached(made[-1])})
        compared = matching.compare(evaluations_of(ours), evaluations_of(made[-1]))
        return made, {"target": target, "responses": WINDOW, "rounds": history, **compared}


def mean_reached(records: Sequence[Record]) -> float:
    """Return the mean cost that the runs of a method have reached in training."""
    return float(np.mean([record.reached for record in records]))


def evaluations_of(records: Iterable[Record]) -> list[Evaluation]:
    """Return the evaluations of the final policies."""
    return [record.evaluation for record in records]


def spent(records: Sequence[Record]) -> dict[str, float | None]:
    """Return what a run of a method took: minutes of its steps, tokens that they learned from.

    minutes: the median over seeds, since what else a machine did makes some runs several times as long as others.
    tokens: the mean over the records that have them, whose number is `counted`.
    """
    tokens = [record.tokens for record in records if record.tokens is not None]
    return {
        "minutes": float(np.median([record.minutes for record in records])),
        "tokens": float(np.mean(tokens)) if tokens else None,
        "counted": len(tokens),
    }


def final_of(run: Path) -> Path:
    """Return the file of the evaluation of a run's final policy."""
    return run / "eval" / "final.json"


def analyse(evaluations: Mapping[str, Sequence[Evaluation]], baseline: str) -> dict[str, Any]:
    """Compute every quantity of each method, also by kind of prompt, and its difference from the method `baseline`.

    Raises:
        UserError: if the evaluations are of different prompts.
    """
    if len({tuple(e.ids) for seeds in evaluations.values() for e in seeds}) > 1:
        raise UserError("--out: its evaluations are of different prompts; choose another folder")
    of_methods = {method: quantities_of(e, SHOWN) for method, e in evaluations.items()}
    against = {
        method: {
            key: seeds.minus(of_methods[baseline][key])
            for key, seeds in quantities.items()
            if key in of_methods[baseline]
        }
        for method, quantities in of_methods.items()
        if baseline in of_methods and method != baseline
    }
    return {
        "methods": {method: summary_of(quantities) for method, quantities in of_methods.items()},
        "kinds": by_kind(evaluations),
        "against": {"method": baseline, "methods": against},
    }


def quantities_of(evaluations: Sequence[Evaluation], keys: Iterable[str]) -> dict[str, Seeds]:
    """Compute the quantities among `keys` that the evaluations of a method's seeds have."""
    return {
        key: of_seeds(evaluations, key)
        for key in keys
        if key in QUANTITIES and all(one.has(key) for one in evaluations)
    }


def summary_of(quantities: Mapping[str, Seeds]) -> dict[str, Any]:
    """Write the interval and the values of each quantity."""
    return {key: {**within(key, seeds.interval), "seeds": seeds.values.tolist()} for key, seeds in quantities.items()}


def by_kind(evaluations: Mapping[str, Sequence[Evaluation]]) -> dict[str, dict[str, Any]]:
    """Compute what a method does to harmful and to benign prompts.

    Returns:
        {kind: {"prompts": n, "methods": quantities by method}}; {} unless there are prompts of both kinds.
    """
    kinds: dict[str, dict[str, Any]] = {}
    for method, seeds in evaluations.items():
        divided = [kinds_of(e) for e in seeds]
        for kind in KINDS if all(divided) else ():
            parts = [parts[kind] for parts in divided]
            here = kinds.setdefault(kind, {"prompts": len(parts[0].ids), "methods": {}})
            here["methods"][method] = summary_of(quantities_of(parts, SHOWN_OF_KIND))
    return kinds


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = [name for name in METHODS if name != MATCHED]
    parser.add_argument("--methods", nargs="+", choices=named, help=f"methods to train; default: {' '.join(COMPARED)}")
    parser.add_argument(
        "--neighbours",
        action="store_true",
        help=f"compare {' '.join(NEIGHBOURS)} instead, without --match; results named neighbours",
    )
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
    parser.add_argument("--records", type=Path, help="folder of the records of finished runs; without it, --out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("overrides", nargs="*", help="after --: fields of the configuration, the same for every method")
    options = parser.parse_args(argv)
    if options.neighbours and options.methods:
        parser.error("--neighbours names its methods itself; give it or --methods")
    name, methods = ("neighbours", NEIGHBOURS) if options.neighbours else ("reproduce_language", options.methods)
    experiment = Experiment(options.seeds, options.out, options.records or options.out, options.overrides, options.jobs)
    of_methods = experiment.measure({method: METHODS[method].options for method in methods or COMPARED})
    records, matched = [record for method in of_methods.values() for record in method], None
    if options.match and "repo" in of_methods and not options.neighbours:
        rounds, matched = experiment.match(of_methods["repo"], options.match)
        records += [record for made in rounds for record in made]
        of_methods[MATCHED] = rounds[-1]
    evaluations = {name: evaluations_of(method) for name, method in of_methods.items()}
    first = records[0].evaluation
    results = {
        "command": "python -m benchmarks.reproduce.language " + " ".join(sys.argv[1:] if argv is None else argv),
        "machine": machine(),
        "machines": dict(Counter(record.machine for record in records)),
        "minutes": sum(record.minutes for record in records),
        "versions": versions(),
        "seeds": options.seeds,
        "prompts": len(first.ids),
        "samples": first.samples,
        "cost_limit": first.cost_limit,
        "matched": matched,
        "spent": {method: spent(runs) for method, runs in of_methods.items()},
        **analyse(
            {"reference": [experiment.reference().evaluation], **evaluations}, OURS if options.neighbours else BASELINE
        ),
    }
    figure = draw(results, UNSAFE, 1) if options.neighbours else draw(results)
    write_results(options.results, name, results, markdown(results, name), figure)


if __name__ == "__main__":
    exit_with_sentence(main)
