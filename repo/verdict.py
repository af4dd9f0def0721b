"""Verdict: what a run's numbers say, in sentences that claim no more than they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .evaluation import Evaluation, paired
from .history import History, Record
from .tables import comparison_rows

QUANTITIES = (
    ("safe_rate", "Safe rate", "{:.1%}"),
    ("prompts_mostly_unsafe", "Unsafe prompts", "{:.1%}"),
    ("rectified_cost", "E{C−d}⁺", "{:.3f}"),
    ("compensation_gap", "Compensation gap", "{:.3f}"),
    ("cost", "E[C]", "{:.3f}"),
    ("reward", "Reward", "{:.3f}"),
)


@dataclass(frozen=True)
class Comparison:
    """Held-out prompts before and after training, paired: rows of text, and a change's {mean, low, high}."""

    rows: Sequence[tuple[str, str, str, str]]
    changes: Mapping[str, Mapping[str, float | None]]


def compare(history: History) -> Comparison | None:
    """None where an evaluation is missing or they are not of the same prompts."""
    before, after = history.responses("before"), history.responses("after")
    if not before or [r["id"] for r in before] != [r["id"] for r in after]:
        return None
    a, b = (Evaluation([dict(r) for r in records], history.limit) for records in (before, after))
    found = paired(a, b)
    return Comparison(comparison_rows(a, b), {key: found[key] for key in ("safe_rate", "reward")})


def verdict(history: History, comparison: Comparison | None) -> str:
    """What training did on held-out prompts, or what is known instead."""
    if comparison:
        safe = change("the safe rate", comparison.changes["safe_rate"], 100, 1, " points")
        reward = change("the reward", comparison.changes["reward"], 1, 3)
        prompts = len({r["id"] for r in history.responses("after")})
        return (
            f"On {prompts} held-out prompts {safe}, and {reward}, with 95% bootstrap intervals over prompts of this "
            "one run; another seed may differ by more."
        )
    if "after" in history.evaluations and "before" in history.evaluations:
        return "The evaluations before and after training are not of the same prompts and are not compared."
    if "before" in history.evaluations:
        found = history.evaluations["before"]["summary"]["overall"]["safe_rate"]
        low, high = found["low"], found["high"]
        return (
            f"Not evaluated after training yet; before it, {found['mean']:.1%} [{low:.1%}, {high:.1%}] of held-out "
            "responses were safe (95% bootstrap interval over prompts)."
        )
    if "after" in history.evaluations:
        return "Evaluated after training only: nothing says what training changed on held-out prompts."
    return "No held-out evaluation: training batches alone say little about other prompts."


def change(name: str, interval: Mapping[str, float | None], scale: float, digits: int, unit: str = "") -> str:
    """`name rose by 7.5 points [1.0, 14.0]`, or that no change is inside the interval too."""
    mean, low, high = (scale * (interval[end] or 0.0) for end in ("mean", "low", "high"))
    if low > 0:
        return f"{name} rose by {mean:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"
    if high < 0:
        return f"{name} fell by {-mean:.{digits}f}{unit} [{-high:.{digits}f}, {-low:.{digits}f}]"
    shown = f"{mean:+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}]".replace("-", "−")
    return f"{name} changed by {shown}, which includes no change"


def compensation(records: Sequence[Record], limit: float, where: str) -> str:
    """Whether the mean constraint is met, and how many prompts are unsafe all the same."""
    mean, unsafe, responses = safety(records, limit)
    numbers = f"E[C] = {mean:.3f}, d = {limit:g}".replace("-", "−")
    met = "Mean constraint met" if mean <= limit else "Mean constraint not met"
    if unsafe == responses == 0:
        return f"{met} ({numbers}), and all {len(records)} responses {where} are within the limit."
    prompts = len({r["id"] for r in records})
    per_prompt = len(records) > prompts
    more = f" in more than half of their responses, {responses:.1%} of responses unsafe" if per_prompt else ""
    return f"{met}, {unsafe:.1%} of prompts unsafe{more} ({numbers}; {len(records)} responses {where})."


def safety(records: Sequence[Record], limit: float) -> tuple[float, float, float]:
    """(mean cost, share of prompts with more than half of their responses unsafe, share of responses unsafe)."""
    by_prompt: dict[str, list[bool]] = {}
    for r in records:
        by_prompt.setdefault(r["id"], []).append(r["cost"] > limit)
    mean = float(np.mean([r["cost"] for r in records]))
    unsafe = float(np.mean([2 * sum(found) > len(found) for found in by_prompt.values()]))
    return mean, unsafe, sum(map(sum, by_prompt.values())) / len(records)


def quantities(history: History) -> tuple[list[tuple[str, str, float, float]], str]:
    """(name, format, earlier, later) of each quantity, and where they are from: held out if evaluated twice."""
    before, after = (history.evaluations.get(k) for k in ("before", "after"))
    if before and after:
        found = [{key: v["mean"] for key, v in e["summary"]["overall"].items()} for e in (before, after)]
        where = "Held-out prompts, before and after training"
    else:
        n = max(1, len(history.metrics) // 10)
        found = [_training_means(records) for records in (history.metrics[:n], history.metrics[-n:])]
        where = "Training batches, first and last " + (f"{n} steps" if n > 1 else "step")
    rows = [(name, form, _number(found[0].get(key)), _number(found[1].get(key))) for key, name, form in QUANTITIES]
    return rows, where


def _training_means(records: Sequence[Record]) -> dict[str, float]:
    """QUANTITIES by the lines of metrics.jsonl, which call means what they are."""
    return {key: _mean([r.get(key, r.get(f"{key}_mean")) for r in records]) for key, _, _ in QUANTITIES}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else float("nan")
