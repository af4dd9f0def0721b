"""Headline of a report: state a run's result in sentences that claim no more than its numbers show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..evaluation.statistics import paired
from ..evaluation.tables import kind_rows, show, show_change
from ..scoring.safety import TITLES, Compensation, describe_compensation
from .run_history import History, Record

TILES = (
    "safe_rate",
    "judge_safe_rate",
    "prompts_mostly_unsafe",
    "rectified_cost",
    "compensation_gap",
    "cost",
    "reward",
)
"""Quantities on the tiles at the top of a report."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of the same held-out prompts before and after training.

    rows: (quantity, before, after, change) as text.
    changes: {"mean", "low", "high"} of each quantity's paired change.
    """

    rows: Sequence[Sequence[str]]
    changes: Mapping[str, Mapping[str, float | None]]


def compare(history: History) -> Comparison | None:
    """Compare the evaluations before and after training; None if one is missing or their prompts differ."""
    if not history.paired:
        return None
    before, after = history.evaluations["before"], history.evaluations["after"]
    changes = paired(before.evaluation, after.evaluation)
    rows = [
        (name, *cells, show_change(changes[key], TITLES[key].form) if key in changes else "–")
        for key, name, cells in quantity_rows((before.overall, after.overall))
    ]
    return Comparison([*rows, *kind_rows(before.evaluation, after.evaluation)], changes)


def quantity_rows(
    evaluations: Sequence[Mapping[str, Mapping[str, float | None]]],
) -> list[tuple[str, str, tuple[str, ...]]]:
    """List (key, title, one cell per evaluation) of every quantity that at least one evaluation has."""
    return [
        (key, title.name, tuple(show(e[key], title.form) if key in e else "–" for e in evaluations))
        for key, title in TITLES.items()
        if any(key in e for e in evaluations)
    ]


def verdict(history: History, comparison: Comparison | None) -> str:
    """State in a sentence or two what training changed on held-out prompts, or why that is not known."""
    if comparison:
        changes = comparison.changes
        clauses = [change("the safe rate by the training cost", changes["safe_rate"], 100, 1, " points")]
        if "judge_safe_rate" in changes:
            clauses.append(change("by the held-out judge it", changes["judge_safe_rate"], 100, 1, " points"))
        clauses.append(change("the reward", changes["reward"], 1, 3))
        prompts = len(history.evaluations["after"].evaluation.ids)
        known = any(changes[key]["low"] is not None for key in ("safe_rate", "reward"))
        intervals = "Brackets hold 95% bootstrap intervals over prompts of this one run" if known else "This is one run"
        return f"On {prompts} held-out prompts {'; '.join(clauses)}. {intervals}; another seed may differ by more."
    if "after" in history.evaluations and "before" in history.evaluations:
        return "The evaluations before and after training are not of the same prompts and are not compared."
    if "before" in history.evaluations:
        rate = history.evaluations["before"].overall["safe_rate"]
        interval = "too few prompts for an interval" if rate["low"] is None else "95% bootstrap interval over prompts"
        return (
            f"Not evaluated after training yet; before it, {show(rate, '{:.1%}')} of held-out responses were safe by "
            f"the training cost ({interval})."
        )
    if "after" in history.evaluations:
        return "Evaluated after training only, so it is not known what training changed on held-out prompts."
    return "No held-out evaluation: training batches alone say little about other prompts."


def change(name: str, interval: Mapping[str, float | None], scale: float, digits: int, unit: str = "") -> str:
    """Describe a change: `name rose by 7.5 points [1.0, 14.0]`, or that its interval includes no change.

    interval: {"mean", "low", "high"}; without "low" and "high" no direction is claimed.
    scale: factor of the numbers. digits: decimals. unit: text after the number.
    """
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


def compensation(history: History) -> Compensation | None:
    """Describe what the mean cost of a run's newest responses hides; None if the run has no responses.

    The newest are those to held-out prompts after training, else those of the last training steps, else those to
    held-out prompts before training.
    """
    if after := history.responses("after"):
        return describe_records(after, history.limit, "to held-out prompts after training")
    if history.samples:
        span = "step" if history.tenth == 1 else f"{history.tenth} steps"
        return describe_records(history.now, history.limit, f"of the last {span} of training")
    before = history.responses("before")
    return describe_records(before, history.limit, "to held-out prompts before training") if before else None


def describe_records(records: Sequence[Record], limit: float, where: str) -> Compensation:
    """Describe what the mean cost of a non-empty list of records hides. where: which responses they are."""
    costs = torch.tensor([r["cost"] for r in records], dtype=torch.float64)
    return describe_compensation([r["id"] for r in records], costs, limit, where)


def tiles(history: History) -> tuple[list[tuple[str, str, float, float]], str]:
    """List the quantities of the tiles as (name, format, earlier value, later value), and name their responses.

    The values are of held-out prompts if the same ones were evaluated before and after training, else of the first and
    last training batches. A value that is not known is NaN.
    """
    if history.paired:
        sides = (history.evaluations[k].overall for k in ("before", "after"))
        means: list[Mapping[str, float | None]] = [{key: v["mean"] for key, v in overall.items()} for overall in sides]
        where = "Held-out prompts, before and after training"
    else:
        n = max(1, len(history.metrics) // 10)
        means = [_training_means(records) for records in (history.metrics[:n], history.metrics[-n:])]
        where = "Training batches, first and last " + (f"{n} steps" if n > 1 else "step")
    earlier, later = means
    rows = [(TITLES[key].short, TITLES[key].form, _number(earlier.get(key)), _number(later.get(key))) for key in TILES]
    return [row for row in rows if np.isfinite(row[2:]).any()], where


def _training_means(records: Sequence[Record]) -> Mapping[str, float | None]:
    """Average TILES over lines of metrics.jsonl, where the key of some quantities ends in _mean."""
    return {key: _mean([r.get(key, r.get(f"{key}_mean")) for r in records]) for key in TILES}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else float("nan")
