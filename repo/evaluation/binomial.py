"""Exact upper bounds of a probability from a count of independent events."""

from __future__ import annotations

import math

import numpy as np

from .statistics import LEVEL

HALVINGS = 60  # of [0, 1]: to the last bit of a double near 1


def clopper_pearson_upper(events: int, trials: int, level: float = LEVEL) -> float:
    """Compute the one-sided Clopper-Pearson bound of a probability p.

    The bound is the p at which at most `events` of `trials` independent trials happen with probability 1 - level, that
    is the quantile `level` of Beta(events + 1, trials - events). Whatever p is, the bound is at least p in a share of
    `level` or more of all experiments. Source: Clopper and Pearson, Biometrika 26 (1934).

    events: integer in [0, trials]. trials: integer >= 0; without one, and where all are events, the bound is 1.
    level: in (0, 1).

    Raises ValueError if events is not in [0, trials] or level not in (0, 1).
    """
    if not 0 <= events <= trials:
        raise ValueError(f"events must be in [0, trials]; got {events} of {trials}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1); got {level}")
    if events == trials:
        return 1.0
    if events == 0:
        return -math.expm1(math.log1p(-level) / trials)  # 1 - (1 - level)^(1 / trials)
    low, high = events / trials, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(events, trials, middle) > 1 - level else (low, middle)
    return high


def _at_most(events: int, trials: int, p: float) -> float:
    """Compute the probability of at most `events` of `trials` events of probability p, in (0, 1)."""
    counts = np.arange(events + 1)
    log_choose = np.array([math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) for k in counts])
    return float(np.exp(log_choose + counts * math.log(p) + (trials - counts) * math.log1p(-p)).sum())
