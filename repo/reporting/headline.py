"""Headline of a report: state a run's result in sentences that claim no more than its numbers show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..evaluation.outcome import Outcome, direction, moved, outcomes
from ..evaluation.statistics import SEVERAL, paired
from ..evaluation.tables import kind_rows, show, show_change
from ..scoring.safety import TITLES, Compensation, describe_compensation
from .run_history import History, Record

QUESTION = "Is every prompt safer, or only the average?"
TILES = (
    "judge_prompts_mostly_unsafe",
    "prompts_mostly_unsafe",
    "judge_safe_rate",
    "safe_rate",
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
    outcomes: what became of the unsafe prompts, by the scorer that decides first.
    """

    rows: Sequence[Sequence[str]]
    changes: Mapping[str, Mapping[str, float | None]]
    outcomes: Sequence[Outcome]


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
    rows += kind_rows(before.evaluation, after.evaluation)
    return Comparison(rows, changes, outcomes(before.evaluation, after.evaluation))


def quantity_rows(
    evaluations: Sequence[Mapping[str, Mapping[str, float | None]]],
) -> list[tuple[str, str, tuple[str, ...]]]:
    """List (key, title, one cell per evaluation) of every quantity that at least one evaluation has."""
    return [
        (key, title.name, tuple(show(e[key], title.form) if key in e else "–" for e in evaluations))
        for key, title in TITLES.items()
        if any(key in e for e in evaluations)
    ]


def answer(comparison: Comparison) -> tuple[str, str]:
    """Answer QUESTION: in a few words that claim no more than the intervals show, and with the numbers.

    The words follow the scorer that decides first; "the average" is E[C].
    """
    first, mean = comparison.outcomes[0], comparison.changes["cost"]
    counted = [
        f"by the {o.scorer} {o.became_safe} became safe, {o.became_unsafe} became unsafe, {o.stayed_unsafe} stayed "
        "unsafe"
        for o in comparison.outcomes
    ]
    each = "" if first.samples > 1 else ", one response to each"
    numbers = f"Of {first.prompts} held-out prompts{each}, {'; '.join(counted)}. E[C] {moved(mean, 1, 3, '')}."
    return _short_answer(first, direction(mean)), numbers


def _short_answer(outcome: Outcome, mean: int | None) -> str:
    """Answer QUESTION in a few words. mean: the direction in which E[C] changed."""
    if outcome.samples == 1:
        return "Not known: one response does not tell what a prompt mostly gets."
    if not outcome.after:
        return "Every prompt: none is mostly unsafe after training."
    share = direction(outcome.change)
    if share is None:
        return "Not known: too few prompts to tell a change from noise."
    if share < 0:
        return "More prompts are safe, but not every one."
    prompts = "more prompts are mostly unsafe" if share else "as many prompts are mostly unsafe, within noise"
    if mean == -1:
        return f"Only the average: {prompts}."
    return f"Neither: {prompts}."


def summary(history: History, comparison: Comparison | None) -> str:
    """State in a sentence or two what training changed on held-out prompts, or why that is not known."""
    if comparison:
        changes = comparison.changes
        clauses = [f"the safe rate by the training cost {moved(changes['safe_rate'])}"]
        if "judge_safe_rate" in changes:
            clauses.append(f"by the held-out judge it {moved(changes['judge_safe_rate'])}")
        clauses.append(f"the reward {moved(changes['reward'], 1, 3, '')}")
        known = any(changes[key]["low"] is not None for key in ("safe_rate", "reward"))
        intervals = "Brackets hold 95% bootstrap intervals over prompts of this one run" if known else "This is one run"
        prompts = len(history.evaluations["after"].evaluation.ids)
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
    shown = [key for key in TILES if np.isfinite([_number(earlier.get(key)), _number(later.get(key))]).any()]
    if not history.paired and history.samples_per_prompt == 1:
        shown = [key for key in shown if key not in SEVERAL]
    if SEVERAL & set(shown):
        where += ". A prompt is unsafe if more than half of its responses are"
    rows = [(TITLES[key].short, TITLES[key].form, _number(earlier.get(key)), _number(later.get(key))) for key in shown]
    return rows, where


def _training_means(records: Sequence[Record]) -> Mapping[str, float | None]:
    """Average TILES over lines of metrics.jsonl, where the key of some quantities ends in _mean."""
    return {key: _mean([r.get(key, r.get(f"{key}_mean")) for r in records]) for key in TILES}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else float("nan")
