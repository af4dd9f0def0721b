"""PPO-Lagrangian at the mean cost that RePO reaches, so that the two differ in what they leave unsafe alone.

The limit is chosen on the batches of training: the held-out prompts take no part. With the limit at RePO's mean cost
PPO-Lagrangian may still rest above or below it, since its lambda moves slowly; each further round moves the limit by
what the round before has missed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repo.evaluation.statistics import Evaluation
from repo.training.multipliers import WINDOW

from .over_seeds import Seeds, of_seeds

CLOSE = 0.1
"""Largest difference of two mean costs, in units of the cost, that counts as the same."""


def last_costs(run: Path) -> float:
    """Return the mean cost of the last WINDOW responses of a run's training, or of all if there are fewer.

    It is the number that PPO-Lagrangian's rule reads.
    """
    lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return float(np.mean([json.loads(line)["cost"] for line in lines[-WINDOW:]]))


def next_limit(target: float, rounds: Sequence[dict[str, float | None]]) -> float:
    """Choose the cost limit of the next round: `target` at first, then moved by what the last round has missed.

    Args:
        rounds: {"limit", "reached"} of each round so far.
    """
    if not rounds:
        return round(target, 3)
    last = rounds[-1]
    assert last["limit"] is not None
    assert last["reached"] is not None
    return round(last["limit"] + target - last["reached"], 3)


def compare(ours: Sequence[Evaluation], theirs: Sequence[Evaluation]) -> dict[str, Any]:
    """Compare matched PPO-Lagrangian with RePO on the held-out prompts.

    Args:
        ours: of RePO's seeds. theirs: of PPO-Lagrangian's.

    Returns:
        cost: interval of the difference of E[C]. is_matched: it is at most `within`. ratio: of the shares of prompts
        mostly unsafe, None where RePO leaves none. beyond_twice: interval of PPO-Lagrangian's share less twice RePO's.
    """
    cost = of_seeds(theirs, "cost").minus(of_seeds(ours, "cost"))
    unsafe, other = (of_seeds(side, "prompts_mostly_unsafe") for side in (ours, theirs))
    twice = Seeds(2 * unsafe.values, 2 * unsafe.resampled)
    assert cost["mean"] is not None
    return {
        "cost": cost,
        "within": CLOSE,
        "is_matched": abs(cost["mean"]) <= CLOSE,
        "ratio": float(other.values.mean() / unsafe.values.mean()) if unsafe.values.any() else None,
        "beyond_twice": other.minus(twice),
    }
