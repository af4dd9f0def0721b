"""Verdict: what a run's numbers say, in sentences that claim no more than they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..evaluation.statistics import paired
from ..evaluation.tables import TITLES, show, show_change
from ..runs.console import summarize
from .run_history import History, Record

QUANTITIES = (
    ("safe_rate", "Safe rate (training cost)", "{:.1%}"),
    ("judge_safe_rate", "Safe rate (held-out judge)", "{:.1%}"),
    ("prompts_mostly_unsafe", "Unsafe prompts", "{:.1%}"),
    ("rectified_cost", "E{C−d}⁺", "{:.3f}"),
    ("compensation_gap", "Compensation gap", "{:.3f}"),
    ("cost", "E[C]", "{:.3f}"),
    ("reward", "Reward", "{:.3f}"),
)


@dataclass(frozen=True)
class Comparison:
    """The same held-out prompts before and after training: rows of text, and {mean, low, high} of each change."""

    rows: Sequence[Sequence[str]]
    changes: Mapping[str, Mapping[str, float | None]]


def compare(history: History) -> Comparison | None:
    """None where an evaluation is missing or they are not of the same prompts."""
    if not history.paired:
        return None
    before, after = history.evaluations["before"], history.evaluations["after"]
    changes = paired(before.evaluation, after.evaluation)
    rows = [
        (name, *cells, show_change(changes[key], TITLES[key][1]) if key in changes else "–")
        for key, name, cells in quantity_rows((before.overall, after.overall))
    ]
    return Comparison(rows, changes)


def quantity_rows(
    found: Sequence[Mapping[str, Mapping[str, float | None]]],
) -> list[tuple[str, str, tuple[str, ...]]]:
    """(key, title, a cell for each evaluation) of what at least one of them has."""
    return [
        (key, name, tuple(show(f[key], form) if key in f else "–" for f in found))
        for key, (name, form) in TITLES.items()
        if any(key in f for f in found)
    ]


def verdict(history: History, comparison: Comparison | None) -> str:
    """What training did on held-out prompts, or what is known instead."""
    if comparison:
        changes = comparison.changes
        told = [change("the safe rate by the training cost", changes["safe_rate"], 100, 1, " points")]
        if "judge_safe_rate" in changes:
            told.append(change("by the held-out judge it", changes["judge_safe_rate"], 100, 1, " points"))
        told.append(change("the reward", changes["reward"], 1, 3))
        prompts = len(history.evaluations["after"].evaluation.ids)
        known = any(changes[key]["low"] is not None for key in ("safe_rate", "reward"))
        intervals = "In brackets 95% bootstrap intervals over prompts of this one run" if known else "This is one run"
        return f"On {prompts} held-out prompts {'; '.join(told)}. {intervals}; another seed may differ by more."
    if "after" in history.evaluations and "before" in history.evaluations:
        return "The evaluations before and after training are not of the same prompts and are not compared."
    if "before" in history.evaluations:
        found = history.evaluations["before"].overall["safe_rate"]
        interval = "too few prompts for an interval" if found["low"] is None else "95% bootstrap interval over prompts"
        return (
            f"Not evaluated after training yet; before it, {show(found, '{:.1%}')} of held-out responses were safe by "
            f"the training cost ({interval})."
        )
    if "after" in history.evaluations:
        return "Evaluated after training only: nothing says what training changed on held-out prompts."
    return "No held-out evaluation: training batches alone say little about other prompts."


def change(name: str, interval: Mapping[str, float | None], scale: float, digits: int, unit: str = "") -> str:
    """`name rose by 7.5 points [1.0, 14.0]`, or that no change is inside the interval too. Without an interval, no
    claim."""
    mean, low, high = (None if (v := interval[end]) is None else scale * v for end in ("mean", "low", "high"))
    if mean is None:
        return f"{name} cannot be compared"
    if low is None or high is None:
        return f"{name} changed by {mean:+.{digits}f}{unit} (too few prompts for an interval)".replace("-", "−")
    if low > 0:
        return f"{name} rose by {mean:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"
    if high < 0:
        return f"{name} fell by {-mean:.{digits}f}{unit} [{-high:.{digits}f}, {-low:.{digits}f}]"
    shown = f"{mean:+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}]".replace("-", "−")
    return f"{name} changed by {shown}, which includes no change"


@dataclass(frozen=True)
class Compensation:
    """Whether the mean constraint is met and how many prompts are unsafe; hidden: it is met although some are."""

    sentence: str
    hidden: bool


def compensation(records: Sequence[Record], limit: float, where: str) -> Compensation:
    """Of responses that are not none."""
    index: dict[str, int] = {}
    group = torch.tensor([index.setdefault(r["id"], len(index)) for r in records])
    rewards, costs = (torch.tensor([r[key] for r in records], dtype=torch.float64) for key in ("reward", "cost"))
    found = summarize(rewards, costs, group, limit)
    mean, unsafe, responses = found["cost_mean"], found["prompts_mostly_unsafe"], 1 - found["safe_rate"]
    numbers = f"E[C] = {mean:.3f}, d = {limit:g}".replace("-", "−")
    met = "Mean constraint met" if mean <= limit else "Mean constraint not met"
    if responses == 0:
        sentence = f"{met} ({numbers}), and all {len(records)} responses {where} are within the limit."
        return Compensation(sentence, False)
    per_prompt = len(records) > len(index)
    more = f" in more than half of their responses, {responses:.1%} of responses unsafe" if per_prompt else ""
    sentence = f"{met}, {unsafe:.1%} of prompts unsafe{more} ({numbers}; {len(records)} responses {where})."
    return Compensation(sentence, mean <= limit)


def quantities(history: History) -> tuple[list[tuple[str, str, float, float]], str]:
    """(name, format, earlier, later) of each quantity that is known, and where they are from: held out if the same
    prompts were evaluated twice."""
    if history.paired:
        sides = (history.evaluations[k].overall for k in ("before", "after"))
        found: list[Mapping[str, float | None]] = [{key: v["mean"] for key, v in overall.items()} for overall in sides]
        where = "Held-out prompts, before and after training"
    else:
        n = max(1, len(history.metrics) // 10)
        found = [_training_means(records) for records in (history.metrics[:n], history.metrics[-n:])]
        where = "Training batches, first and last " + (f"{n} steps" if n > 1 else "step")
    rows = [(name, form, _number(found[0].get(key)), _number(found[1].get(key))) for key, name, form in QUANTITIES]
    return [row for row in rows if np.isfinite(row[2:]).any()], where


def _training_means(records: Sequence[Record]) -> Mapping[str, float | None]:
    """QUANTITIES by the lines of metrics.jsonl, which call means what they are."""
    return {key: _mean([r.get(key, r.get(f"{key}_mean")) for r in records]) for key, _, _ in QUANTITIES}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else float("nan")
