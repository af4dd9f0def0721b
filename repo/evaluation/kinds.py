"""Kinds of prompts: harmful and benign ones, whose totals a table shows beside the whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .statistics import Evaluation, measured, paired

KINDS = ("harmful", "benign")
SHOWN = (
    "reward",
    "safe_rate",
    "judge_safe_rate",
    "judge_prompts_mostly_unsafe",
    "rectified_cost",
    "refusal_rate",
    "topical",
    "ended",
    "helpful",
)
"""Quantities that are shown for each kind."""
CATEGORIES = {"harmful": "harmful", "benign": "benign", "harmless": "benign"}
EMBEDDED = re.compile(r"(advbench|truthfulqa|chatterbot(?:-[\w ]+)?|everyday)-\d{3,}")


def kind_of(record: Mapping[str, Any]) -> str | None:
    """Return "harmful" or "benign" for the prompt of a record, None if it is not known.

    A category of this name says so, and the ids of the embedded prompts do: AdvBench's are the harmful ones.
    """
    if kind := CATEGORIES.get(str(record.get("category") or "").casefold()):
        return kind
    source = EMBEDDED.fullmatch(str(record["id"]))
    return None if source is None else "harmful" if source[1] == "advbench" else "benign"


def of_kind(evaluation: Evaluation, kind: str) -> Evaluation:
    """Return the responses to the prompts of one kind."""
    return Evaluation([r for r in evaluation.records if kind_of(r) == kind], evaluation.cost_limit)


def kinds_of(evaluation: Evaluation) -> dict[str, Evaluation]:
    """Divide an evaluation by kind; {} unless it has prompts of both kinds."""
    parts = {kind: of_kind(evaluation, kind) for kind in KINDS}
    return parts if all(part.records for part in parts.values()) else {}


def measured_by_kind(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Measure every quantity for each kind, as {kind: {"prompts": n, quantity: interval}}; {} without both kinds."""
    return {kind: {"prompts": len(part.ids), **measured(part.columns)} for kind, part in kinds_of(evaluation).items()}


def changes_by_kind(before: Evaluation, after: Evaluation) -> dict[str, dict[str, dict[str, float | None]]]:
    """Measure the paired change of every quantity for each kind; {} unless both evaluations have both kinds."""
    ours, theirs = kinds_of(before), kinds_of(after)
    if not (ours and theirs):
        return {}
    return {kind: paired(ours[kind], theirs[kind]) for kind in KINDS}


def transitions(before: Evaluation, after: Evaluation) -> np.ndarray:
    """Count prompts by whether their mean cost is within the limit before (row) and after (column): (2, 2) int64.

    Index 0 is safe, 1 is unsafe. Both evaluations have the same prompts in the same order.
    """
    limit = before.limit
    sides = [(e.columns["cost"].mean(1) > limit).astype(int) for e in (before, after)]
    counts = np.zeros((2, 2), dtype=np.int64)
    np.add.at(counts, tuple(sides), 1)
    return counts
