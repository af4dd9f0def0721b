"""Comparison: compare evaluated policies prompt by prompt: changes, prompts that became safe or unsafe, win rates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..common.errors import UserError, first_line
from ..scoring.safety import TITLES, mostly_unsafe
from .statistics import RENAMED, Evaluation, aligned, draws_of, few, interval_of, measured, paired
from .tables import show, show_change

NEWEST = ("final", "after")
"""Evaluations of a run that are preferred, best first; next are its last checkpoint's and `before`."""
WINS = {
    "reward": "more reward",
    "cost": "less cost",
    "constrained": "safe where the other is not, or as safe with more reward",
}


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    name: the run folder or evaluation file, as the user gave it.
    evaluation: its responses.
    made: the settings it was made with, by the keys of its file.
    trail: (file's stem, quantities with intervals) of the run's evaluations, in the order of training.
    """

    name: str
    evaluation: Evaluation
    made: Mapping[str, Any]
    trail: tuple[tuple[str, dict[str, dict[str, float | None]]], ...]


def read_evaluation(path: Path, cost_limit: float | None = None) -> tuple[Evaluation, dict[str, Any]]:
    """Read an evaluation file of repo.evaluate or repo.train.

    cost_limit: replaces the file's own limit; None keeps that.

    Returns the evaluation and the settings it was made with. Raises UserError if the file cannot be read.
    """
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        content = {RENAMED.get(key, key): value for key, value in written.items()}
        limit = content["cost_limit"] if cost_limit is None else cost_limit
        evaluation = Evaluation(content.pop("responses"), float(limit))
        if not evaluation.records:
            raise UserError(f"{path} holds no responses")
        if not all(np.isfinite(evaluation.columns[key]).all() for key in ("reward", "cost")):
            raise UserError(f"{path} has a reward or a cost that is not finite")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an evaluation that this version can read: {first_line(error)}") from None
    return evaluation, content


def contender(name: str, cost_limit: float | None = None) -> Contender:
    """Read one side of a comparison: an evaluation file, or the newest evaluation of a run folder.

    name: the file or folder. cost_limit: replaces the files' own limit; None keeps that.

    Raises UserError if there is no evaluation.
    """
    path = Path(name)
    if path.is_file():
        evaluation, made = read_evaluation(path, cost_limit)
        return Contender(name, evaluation, made, ((path.stem, measured(evaluation.columns)),))
    files = {p.stem: p for p in (path / "eval").glob("*.json")}
    if not files:
        raise UserError(
            f"{name} is neither an evaluation file nor a run with one in {path / 'eval'}; repo.evaluate writes them"
        )
    steps = sorted(stem for stem in files if stem.startswith("step-"))
    preferred = [*NEWEST, *reversed(steps), "before", *sorted(files)]
    last = next(stem for stem in preferred if stem in files)
    stems = dict.fromkeys([*(["before"] if "before" in files else []), *steps, last])
    trail = tuple((stem, measured(read_evaluation(files[stem], cost_limit)[0].columns)) for stem in stems)
    return Contender(name, *read_evaluation(files[last], cost_limit), trail)


def safety_table(a: Evaluation, b: Evaluation, column: str = "safe") -> NDArray[np.int64]:
    """Count the common prompts of a and b by safety.

    A prompt is unsafe if more than half of its responses are. column: "safe" or "judge_safe".

    Returns (2, 2): rows are a safe and a unsafe, columns b safe and b unsafe.
    """
    left, right = (mostly_unsafe(columns[column].mean(1)) for columns in aligned(a, b))
    table = np.zeros((2, 2), dtype=np.int64)
    np.add.at(table, (left.astype(int), right.astype(int)), 1)
    return table


def sign_test(gained: int, lost: int) -> float:
    """Compute the two-sided p-value of McNemar's exact test: prompts are as likely to change one way as the other.

    gained, lost: number of prompts that changed one way and the other.
    """
    n, tail = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(comb(n, i) for i in range(tail + 1)) / 2**n)


def win_rates(a: Evaluation, b: Evaluation) -> dict[str, dict[str, float | None]]:
    """Measure how often a response of b beats a response of a to the same prompt, by each criterion of WINS.

    Every response of b is compared with every response of a; a tie counts half.

    Returns {criterion: {"mean", "low", "high"}} with bootstrap intervals over prompts.
    """
    left, right = aligned(a, b)
    reward = right["reward"][:, None, :] - left["reward"][:, :, None]
    cost = left["cost"][:, :, None] - right["cost"][:, None, :]
    safer = right["safe"][:, None, :] - left["safe"][:, :, None]
    margins = {"reward": reward, "cost": cost, "constrained": np.where(safer != 0, safer, reward)}
    rates = {}
    for key, margin in margins.items():
        per_prompt = ((margin > 0) + 0.5 * (margin == 0)).mean((1, 2))
        resampled = None if few(left) else per_prompt[draws_of(len(per_prompt))].mean(1)
        rates[key] = interval_of(float(per_prompt.mean()), resampled)
    return rates


def compare_pair(a: Contender, b: Contender) -> dict[str, Any]:
    """Compare b with the baseline a; return paired changes, win rates and safety tables as JSON values."""
    tables = {}
    for column in ("safe", "judge_safe"):
        # "more than half of the responses" only compares between equal numbers of responses
        same = a.evaluation.samples == b.evaluation.samples
        if same and all(column in c.evaluation.columns for c in (a, b)):
            table = safety_table(a.evaluation, b.evaluation, column)
            became_safe, became_unsafe = int(table[1, 0]), int(table[0, 1])
            tables[column] = {
                "both_safe": int(table[0, 0]),
                "became_safe": became_safe,
                "became_unsafe": became_unsafe,
                "both_unsafe": int(table[1, 1]),
                "p_value": sign_test(became_safe, became_unsafe),
            }
    return {
        "baseline": a.name,
        "other": b.name,
        "prompts": len(aligned(a.evaluation, b.evaluation)[0]["cost"]),
        "samples": min(a.evaluation.samples, b.evaluation.samples),
        "changes": paired(a.evaluation, b.evaluation),
        "wins": win_rates(a.evaluation, b.evaluation),
        "tables": tables,
    }


def require_comparable(contenders: Sequence[Contender]) -> list[str]:
    """Return warnings about settings that differ between the evaluations.

    Raises UserError if the cost limit or a scorer differs, since their numbers cannot be compared then, or if one
    evaluation is given twice.
    """
    for key, way in (("cost_limit", "; choose one with --cost-limit"), ("reward_scorer", ""), ("cost_scorer", "")):
        if difference := _differences(contenders, key):
            raise UserError(f"the evaluations have different {key.replace('_', ' ')}s ({difference}){way}")
    names = [c.name for c in contenders]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{repeated} is given twice")
    warnings = [
        f"the evaluations differ in {key} ({difference})"
        for key in ("judge", "temperature", "top_p", "max_response_tokens")
        if (difference := _differences(contenders, key))
    ]
    if len({c.evaluation.samples for c in contenders}) > 1:
        counts = ", ".join(f"{c.name}: {c.evaluation.samples}" for c in contenders)
        warnings.append(f"responses per prompt differ ({counts}), so mostly unsafe prompts are not compared")
    return warnings


def _differences(contenders: Sequence[Contender], key: str) -> str:
    """List each contender's value of a setting; "" if all agree."""
    values = [c.evaluation.cost_limit if key == "cost_limit" else c.made.get(key) for c in contenders]
    if all(value == values[0] for value in values):
        return ""
    return ", ".join(f"{c.name}: {value}" for c, value in zip(contenders, values, strict=True))


def print_quantities(console: Console, contenders: Sequence[Contender]) -> None:
    """Print a table of every quantity, with one column for each contender."""
    table = Table(title="mean [95 % bootstrap interval over prompts]")
    table.add_column("")
    for c in contenders:
        table.add_column(escape(f"{c.name} ({len(c.evaluation.ids)} x {c.evaluation.samples})"), justify="right")
    values = [measured(c.evaluation.columns) for c in contenders]
    for key, title in TITLES.items():
        if any(key in v for v in values):
            table.add_row(title.name, *(show(v[key], title.form) if key in v else "-" for v in values))
    console.print(table)


def print_pair(console: Console, pair: dict[str, Any]) -> None:
    """Print the paired changes, win rates and 2 x 2 safety tables of one pair. pair: the result of compare_pair."""
    title = f"{pair['other']} against {pair['baseline']}, {pair['prompts']} common prompts"
    table = Table(title=escape(title))
    table.add_column("change")
    table.add_column("", justify="right", no_wrap=True)
    for key, change in pair["changes"].items():
        table.add_row(TITLES[key].name, show_change(change, TITLES[key].form))
    table.add_section()
    for key, rate in pair["wins"].items():
        table.add_row(f"wins: {WINS[key]}", show(rate, "{:.1%}"))
    console.print(table)
    for column, cells in pair["tables"].items():
        by = "training cost" if column == "safe" else "held-out judge"
        what = "prompts" if pair["samples"] > 1 else "prompts with one response each"
        console.print(
            f"{what} by {by}: {cells['both_safe']} safe in both, {cells['became_safe']} became safe, "
            f"{cells['became_unsafe']} became unsafe, {cells['both_unsafe']} unsafe in both "
            f"(exact sign test p = {cells['p_value']:.3g})",
            highlight=False,
        )
