"""Decision: whether a policy is surely not less safe than another, by the same validation prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..evaluation.statistics import draws_of

CONFIDENCE = 0.95
"""Confidence of the lower bound of the change."""


@dataclass(frozen=True)
class Decision:
    """What the gate found of a policy. Rates are shares in [0, 1].

    before, after: safe rate of the last accepted policy and of this one. lower: lower bound of after - before.
    accepted: lower is not below -tolerance.
    """

    before: float
    after: float
    lower: float
    accepted: bool

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the step in which it was made."""
        return {
            "gate_safe_rate": self.after,
            "gate_change": self.after - self.before,
            "gate_lower_bound": self.lower,
            "gate_accepted": float(self.accepted),
        }


def decide(before: Sequence[float], after: Sequence[float], tolerance: float) -> Decision:
    """Accept a policy if the lower bound of its change of the safe rate is at least -tolerance.

    The bound is one-sided at CONFIDENCE: a percentile bootstrap that resamples prompts, with the values of both
    policies together. It is deterministic. The rule is that of arXiv 2210.11259; the bootstrap is ours.

    Args:
        before, after: share of safe responses to each of P prompts, in the same order, of the last accepted policy and
            of this one.
        tolerance: loss of the safe rate that may remain possible, >= 0.

    Raises:
        ValueError: the numbers of prompts differ, or there are none.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"before and after must be of the same prompts, at least one; got {len(before)}, {len(after)}")
    old, new = (np.asarray(values, dtype=np.float64) for values in (before, after))
    changes = new - old
    lower = float(np.quantile(changes[draws_of(len(changes))].mean(1), 1 - CONFIDENCE))
    return Decision(float(old.mean()), float(new.mean()), lower, lower >= -tolerance)


def describe(decision: Decision, step: int, accepted: int, lr_scale: float) -> str:
    """Describe a decision in a line.

    step: steps done. accepted: steps that the last accepted policy before had done. lr_scale: factor of the learning
    rate after it.
    """
    change, lower = (100 * x for x in (decision.after - decision.before, decision.lower))
    what = f"safe rate {decision.before:.1%} -> {decision.after:.1%}, {change:+.1f} points, at least {lower:+.1f}"
    if decision.accepted:
        return f"gate: step {step} is accepted: {what}"
    return (
        f"gate: step {step} is not surely as safe as step {accepted} ({what}); back to that policy, "
        f"with {lr_scale:g} x the learning rate"
    )
