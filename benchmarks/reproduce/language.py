"""Measure the paper's claim: train five methods with equal budgets on the embedded language model and compare them.

    python -m benchmarks.reproduce.language                 # trains and evaluates what is missing, writes the results
    python -m benchmarks.reproduce.language --seeds 0 1 2 --jobs 2 --out reproduce -- --steps 48

All methods share language.yaml and differ in the options of METHODS. Each final policy answers the held-out prompts
with the same random numbers; the training scorers and the held-out judge score the answers. Folders of finished runs
are kept, so that an interrupted command continues; their checkpoints (1.6 GB each) are removed. Results go to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness.machine import machine
from repo.common.errors import UserError, exit_with_sentence
from repo.config.parse import load_config, make_parser, parse_config
from repo.evaluation.comparison import read_evaluation
from repo.evaluation.statistics import QUANTITIES, Array, Evaluation, interval_of, resampled_of
from repo.evaluation.tables import show, show_change
from repo.reporting.style import STYLE
from repo.runs.folder import versions
from repo.runs.json_lines import finite
from repo.scoring.safety import TITLES

CONFIG = Path(__file__).with_name("language.yaml")
RESULTS = Path(__file__).parents[1] / "results"
METHODS = {
    "ppo": ("PPO", ["--algorithm.method=ppo"]),
    "fixed_penalty": ("fixed penalty", ["--algorithm.method=fixed_penalty"]),
    "ppo_lagrangian": ("PPO-Lagrangian", ["--algorithm.method=ppo_lagrangian"]),
    "repo": ("RePO", ["--algorithm.method=repo"]),
    "paper": (
        "RePO, preset paper",
        [
            "--algorithm.advantages=gae",
            "--algorithm.cost_mode=split",
            "--algorithm.kl_placement=reward",
            "--critic.lr=2.0e-5",
        ],
    ),
}
"""Name -> (title, options that differ from language.yaml)."""
BASELINE = "ppo_lagrangian"
SAMPLES, EVALUATION_SEED = 2, 1000
SHOWN = (
    "reward",
    "cost",
    "safe_rate",
    "rectified_cost",
    "compensation_gap",
    "prompts_mostly_unsafe",
    "judge_safe_rate",
    "judge_prompts_mostly_unsafe",
    "refusal_rate",
    "repetition",
    "response_tokens",
    "kl",
)


def call(arguments: Sequence[str], threads: int | None, log: Path) -> None:
    """Run a command of the package and append its output to `log`.

    Raises:
        RuntimeError: if the command fails, with the end of the log.
    """
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-m", *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed; the end of {log}: {log.read_text(encoding='utf-8')[-500:]}")


def train(method: str, seed: int, out: Path, overrides: Sequence[str], threads: int | None) -> None:
    """Train the run out/method-seed, or resume it if it is there.

    Raises:
        UserError: if the run was trained with another configuration.
    """
    run = out / f"{method}-{seed}"
    options = [f"--config={CONFIG}", *METHODS[method][1], f"--seed={seed}", f"--out={run}", *overrides]
    if (run / "config.yaml").is_file():
        wanted, there = parse_config(make_parser("", ""), options), load_config(run / "config.yaml")
        date = wanted.data.date or there.data.date  # of the day on which the run began
        if replace(wanted, out=there.out, data=replace(wanted.data, date=date)) != there:
            raise UserError(f"--out: {run} was trained with another configuration; choose another folder")
        options = ["--resume", str(run)]
    if not (run / "final").is_dir():
        call(["repo.train", *options], threads, out / f"{run.name}.log")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def evaluate(target: str, file: Path, log: Path, options: Sequence[str], threads: int | None) -> Evaluation:
    """Return the evaluation of a run or model; make it if its file is missing."""
    if not file.exists():
        sampled = [f"--evaluation.samples_per_prompt={SAMPLES}", f"--seed={EVALUATION_SEED}"]
        call(["repo.evaluate", target, f"--out={file}", *sampled, *options], threads, log)
    return read_evaluation(file)[0]


@dataclass(frozen=True)
class Seeds:
    """A quantity of a method.

    values: of each seed, (S,). resampled: of each seed's resampled prompts, (S, RESAMPLES).
    """

    values: Array
    resampled: Array

    def draws(self, stream: int = 0) -> Array:
        """Draw the mean over seeds: resampled prompts plus Student's t for the spread of the seeds.

        With one seed the spread of seeds is unknown and left out.

        Args:
            stream: number of the random stream; different streams are independent.

        Returns:
            (RESAMPLES,) draws.
        """
        seeds, resamples = self.resampled.shape
        means = self.resampled.mean(0)
        if seeds > 1:
            error = self.values.std(ddof=1) / np.sqrt(seeds)
            means = means + error * np.random.default_rng(stream).standard_t(seeds - 1, resamples)
        return means

    @property
    def interval(self) -> dict[str, float | None]:
        """Return mean and 95 % interval over seeds and prompts."""
        return interval_of(float(self.values.mean()), self.draws())

    def minus(self, other: Seeds) -> dict[str, float | None]:
        """Return the difference with its interval: both sides draw the same prompts, and seeds independently."""
        return interval_of(float(self.values.mean() - other.values.mean()), self.draws(1) - other.draws(2))


def of_seeds(evaluations: Sequence[Evaluation], key: str) -> Seeds:
    """Compute a quantity from the evaluations of a method's seeds, all on the same prompts."""
    columns = [evaluation.columns for evaluation in evaluations]
    values = np.array([float(QUANTITIES[key](c)) for c in columns])
    return Seeds(values, np.stack([resampled_of(key, c) for c in columns]))


def analyse(evaluations: Mapping[str, Sequence[Evaluation]]) -> dict[str, Any]:
    """Compute every quantity of each method, and its difference from PPO-Lagrangian.

    Raises:
        UserError: if the evaluations are of different prompts.
    """
    if len({tuple(e.ids) for seeds in evaluations.values() for e in seeds}) > 1:
        raise UserError("--out: its evaluations are of different prompts; choose another folder")
    of_methods = {m: {key: of_seeds(e, key) for key in SHOWN if e[0].has(key)} for m, e in evaluations.items()}
    summary: dict[str, Any] = {
        method: {
            key: {**within(key, seeds.interval), "seeds": seeds.values.tolist()} for key, seeds in quantities.items()
        }
        for method, quantities in of_methods.items()
    }
    against = {
        method: {key: seeds.minus(of_methods[BASELINE][key]) for key, seeds in quantities.items()}
        for method, quantities in of_methods.items()
        if BASELINE in of_methods and method != BASELINE
    }
    return {"methods": summary, "against_ppo_lagrangian": against}


def within(key: str, value: dict[str, float | None]) -> dict[str, float | None]:
    """Cut the interval of a share to [0, 1], which Student's t may leave."""
    if not TITLES[key].form.endswith("%}"):
        return value
    return {end: None if v is None else min(max(v, 0.0), 1.0) for end, v in value.items()}


def minutes_of(runs: Iterable[Path]) -> float:
    """Return the minutes that all steps of the runs took."""
    total = 0.0
    for run in runs:
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            total += sum(value for key, value in json.loads(line).items() if key.startswith("seconds_"))
    return total / 60


def title_of(method: str) -> str:
    """Return the name of a method in tables and figures."""
    return METHODS[method][0] if method in METHODS else method


def markdown(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    methods = results["methods"]
    lines = [
        "# Every prompt or the average: five methods on the embedded language model",
        "",
        f"`{results['command']}`; {results['prompts']} held-out prompts x {SAMPLES} samples, seeds {results['seeds']}; "
        f"{results['machine']}; {results['minutes']:.0f} minutes of training in all, {results['jobs']} runs at a time.",
        "",
        "Mean over seeds [95 % interval: prompts bootstrapped, seeds by Student's t].",
        "",
        f"| | {' | '.join(title_of(m) for m in methods)} |",
        "|---|" + "---|" * len(methods),
    ]
    for key in SHOWN:
        if all(key in q for q in methods.values()):
            cells = " | ".join(show(q[key], TITLES[key].form) for q in methods.values())
            lines.append(f"| {TITLES[key].name} | {cells} |")
    against = results["against_ppo_lagrangian"]
    if against:
        lines += ["", "Differences from PPO-Lagrangian, on the same prompts:", ""]
        lines += [f"| | {' | '.join(title_of(m) for m in against)} |", "|---|" + "---|" * len(against)]
        for key in SHOWN:
            if all(key in q for q in against.values()):
                cells = " | ".join(show_change(q[key], TITLES[key].form) for q in against.values())
                lines.append(f"| {TITLES[key].name} | {cells} |")
    lines += ["", "By seed:", "", f"| | {' | '.join(title_of(m) for m in methods)} |", "|---|" + "---|" * len(methods)]
    for key in ("reward", "safe_rate", "judge_safe_rate", "cost"):
        if all(key in q for q in methods.values()):
            form = TITLES[key].form
            cells = " | ".join(", ".join(form.format(v) for v in q[key]["seeds"]) for q in methods.values())
            lines.append(f"| {TITLES[key].name} | {cells} |")
    told = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version != "not installed")
    lines += ["", f"Versions: {told}.", "", "![reward against safe rate by method](reproduce_language.png)"]
    return "\n".join(lines) + "\n"


COLOURS = {
    "reference": "#737b84",
    "ppo": "#c2410c",
    "fixed_penalty": "#8a3ffc",
    "ppo_lagrangian": "#b28600",
    "repo": "#0062a3",
    "paper": "#00795a",
}


PANELS = (("safe_rate", "reward"), ("judge_safe_rate", "reward"), ("rectified_cost", "cost"))
"""Quantities on the two axes of each panel of the figure."""


def draw(results: Mapping[str, Any]) -> Figure:
    """Draw reward against the safe rate by training cost and by judge, and E[C] against E{C-d}+; seeds are hollow."""
    methods = results["methods"]
    pairs = [pair for pair in PANELS if all(pair[0] in quantities for quantities in methods.values())]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.7 * len(pairs), 3.9))
        panels = figure.subplots(1, len(pairs))
        for axes, (across, up) in zip(panels, pairs, strict=True):
            for method, quantities in methods.items():
                x, y, colour = quantities[across], quantities[up], COLOURS.get(method, "#1c2024")
                axes.plot(x["seeds"], y["seeds"], "o", color=colour, mfc="white", ms=4)
                errors = [[[v["mean"] - v["low"]], [v["high"] - v["mean"]]] for v in (y, x)]
                label = title_of(method)
                axes.errorbar(
                    x["mean"], y["mean"], *errors, fmt="o", color=colour, capsize=3, elinewidth=1, label=label
                )
            axes.set(xlabel=TITLES[across].name, ylabel=TITLES[up].name)
            if up == "cost":
                axes.axhline(results["cost_limit"], color="#1c2024", lw=1, ls=":")
            else:
                axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panels[-1].set_title(f"dotted: the mean constraint, {results['cost_limit']:g}", fontsize=8)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=9)
        return figure


def measure(
    methods: Sequence[str], seeds: Sequence[int], out: Path, overrides: Sequence[str], jobs: int
) -> dict[str, list[Evaluation]]:
    """Train and evaluate what is missing, `jobs` runs at a time. Return, by method, an evaluation for each seed."""
    threads = None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
    out.mkdir(parents=True, exist_ok=True)

    def one(pair: tuple[str, int]) -> Evaluation:
        run = out / f"{pair[0]}-{pair[1]}"
        train(*pair, out, overrides, threads)
        evaluation = evaluate(str(run), run / "eval" / "final.json", out / f"{run.name}.log", (), threads)
        print(f"{run.name}: trained, {len(evaluation.records)} responses evaluated", flush=True)
        return evaluation

    pairs = [(method, seed) for seed in seeds for method in methods]
    with ThreadPoolExecutor(jobs) as pool:
        evaluations = dict(zip(pairs, pool.map(one, pairs), strict=True))
    return {method: [evaluations[method, seed] for seed in seeds] for method in methods}


def evaluate_reference(run: Path, out: Path) -> Evaluation:
    """Evaluate the policy that the training of a run started from."""
    return evaluate(str(run), out / "reference.json", out / "reference.log", ["--checkpoint=reference"], None)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to train")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of each method")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; they share the cores")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("overrides", nargs="*", help="after --: fields of the configuration, the same for every method")
    options = parser.parse_args(argv)
    evaluations = measure(options.methods, options.seeds, options.out, options.overrides, options.jobs)
    reference = evaluate_reference(options.out / f"{options.methods[0]}-{options.seeds[0]}", options.out)
    first = next(iter(evaluations.values()))[0]
    results = {
        "command": "python -m benchmarks.reproduce.language " + " ".join(sys.argv[1:] if argv is None else argv),
        "machine": machine(),
        "minutes": minutes_of(options.out / f"{m}-{seed}" for m in options.methods for seed in options.seeds),
        "jobs": options.jobs,
        "versions": versions(),
        "seeds": options.seeds,
        "prompts": len(first.ids),
        "cost_limit": first.cost_limit,
        **analyse({"reference": [reference], **evaluations}),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    text = markdown(results)
    (options.results / "reproduce_language.json").write_text(json.dumps(finite(results), indent=1))
    (options.results / "reproduce_language.md").write_text(text)
    draw(results).savefig(options.results / "reproduce_language.png", dpi=144)
    print(text)


if __name__ == "__main__":
    exit_with_sentence(main)
