"""How many seconds does a training step of each neighbouring method take, and in which of its parts?

    python -m benchmarks.workloads.method_steps             # ten timed steps of each, twice; --steps, --rounds, --out
    python -m benchmarks.workloads.method_steps -- --rollout.max_response_tokens=80     # options of every run

The methods of `benchmarks.reproduce.language --neighbours` train the default configuration in turn, each in a process
of its own and without evaluations; then all of them once more, so that what else slows the machine meets every method.
The first step of a process is not timed. A part that only some steps have, such as the responses that teach λ to the
methods on pairs, is divided among all steps.

Predicted: RePO, PPO-Lagrangian, the barrier and learned credit sample and update on 4 prompts x 4 responses and differ
in a few numbers per response or token: 1.0 of RePO's seconds. The methods on pairs sample as many responses, to 8
prompts, whose tokens (155 more beside 640 of responses) pass through every part once more, and every fifth step they
sample 32 responses for λ: some 1.4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import provenance, told
from benchmarks.reproduce.language import SHARED
from benchmarks.reproduce.methods import COMPARED, METHODS, NEIGHBOURS, OURS, title_of
from benchmarks.reproduce.runs import call
from repo.common.errors import UserError, exit_with_sentence

UNTIMED = 1
"""Steps at the start of a process, which also warm it up."""
PARTS = "seconds_"
"""What the names of the metrics of a step's parts begin with."""


def train(method: str, steps: int, seed: int, overrides: Sequence[str]) -> list[dict[str, float]]:
    """Train a method in a process of its own; return the seconds of each part of each timed step."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        own = [f"--steps={steps + UNTIMED}", f"--seed={seed}", f"--out={run}"]
        options = [*SHARED, *METHODS[method].options, *overrides, *own]
        call(["repo.train", *options], None, Path(name) / "log")
        return seconds_of(run / "metrics.jsonl")[UNTIMED:]


def seconds_of(metrics: Path) -> list[dict[str, float]]:
    """Return the seconds of each part of each step, from the metrics of a run."""
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [{key.removeprefix(PARTS): step[key] for key in step if key.startswith(PARTS)} for step in steps]


def summary(rounds: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Describe a method.

    Args:
        rounds: of each process, of each timed step, the seconds of its parts.

    Returns:
        seconds: of a step, in the mean over all of them; rounds: the same of each process; parts: of each part.
    """
    every = [step for steps in rounds for step in steps]
    parts = dict.fromkeys(part for step in every for part in step)
    return {
        "seconds": statistics.fmean(sum(step.values()) for step in every),
        "rounds": [statistics.fmean(sum(step.values()) for step in steps) for steps in rounds],
        "parts": {part: statistics.fmean(step.get(part, 0.0) for step in every) for part in parts},
    }


def table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Return Markdown with a row for each method: its seconds, those of its parts, and how often RePO's they are."""
    parts = dict.fromkeys(part for one in methods.values() for part in one["parts"])
    lines = [
        f"| | seconds a step, mean [least, most of the rounds] | times {title_of(OURS)}'s | {' | '.join(parts)} |",
        "|---|---|---|" + "---|" * len(parts),
    ]
    for name, one in methods.items():
        ratio = f"{one['seconds'] / methods[OURS]['seconds']:.2f}" if OURS in methods else ""
        cells = " | ".join(f"{one['parts'][part]:.2f}" if part in one["parts"] else "" for part in parts)
        span = f"{one['seconds']:.2f} [{min(one['rounds']):.2f}, {max(one['rounds']):.2f}]"
        lines.append(f"| {title_of(name)} | {span} | {ratio} | {cells} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all methods in turn, print the table, write it as JSON to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = list(dict.fromkeys((*COMPARED, *NEIGHBOURS)))
    parser.add_argument("--methods", nargs="+", choices=named, default=list(NEIGHBOURS), help="methods to time")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each method, with seeds 0, 1, ...")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", help="after --: fields of the configuration, the same for every method")
    options = parser.parse_args(argv)
    for field in ("steps", "rounds"):
        if getattr(options, field) < 1:
            raise UserError(f"--{field} is {getattr(options, field)}; it takes a whole number from 1")
    if options.out and not options.out.parent.is_dir():
        raise UserError(f"--out is {options.out}; it takes a file in a folder that exists")
    where, measured = provenance(), {method: list[list[dict[str, float]]]() for method in options.methods}
    for seed in range(options.rounds):
        for method, rounds in measured.items():
            rounds.append(train(method, options.steps, seed, options.overrides))
            seconds = summary(rounds[-1:])["seconds"]
            print(f"{title_of(method)}, seed {seed}: {seconds:.2f} s a step", file=sys.stderr, flush=True)
    methods = {method: summary(rounds) for method, rounds in measured.items()}
    print(f"{told(where)}\n\n{table(methods)}")
    if options.out:
        told_of = {"steps": options.steps, "overrides": options.overrides, "where": where, "methods": methods}
        options.out.write_text(json.dumps(told_of, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    exit_with_sentence(main)
