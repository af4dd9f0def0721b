"""The sum of the rows of a loss: the loss itself and its statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..codes import CLIPPED_HIGH, CLIPPED_LOW, ROWS, UNSAFE
from ..interface import Loss, RowResults
from .dense import DenseLoss, sequence_counts
from .terms import hinge


def reduce(loss: Loss, prepared: DenseLoss, results: RowResults) -> tuple[Tensor, Tensor]:
    """Return the loss, 0-d, and the statistics (18,) by STATS."""
    live = prepared.live
    rows = dict(zip(ROWS, results.rows[:, live].unbind(0), strict=True))
    return totals(prepared, rows, results.flags[live])


def totals(prepared: DenseLoss, rows: dict[str, Tensor], flags: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss, 0-d, and the statistics (18,) by STATS.

    Args:
        prepared: the loss, all N rows.
        rows: by ROWS, (n,) of at least the live rows; 0 on dead ones.
        flags: (n,), 0 on dead rows.
    """
    log_ratio, live, unsafe = rows["log_ratio"], flags != 0, (flags & UNSAFE) != 0
    ratio = torch.where(live, log_ratio.exp(), 0.0)
    low, high = (flags & CLIPPED_LOW) != 0, (flags & CLIPPED_HIGH) != 0
    counts = (live, unsafe, low & ~unsafe, low & unsafe, high & ~unsafe, high & unsafe)
    sums = torch.stack(
        (
            rows["entropy"],
            rows["kl"],
            *(count.to(ratio.dtype) for count in counts),
            ratio,
            ratio * ratio,
            -log_ratio,
            torch.expm1(log_ratio) - log_ratio,
            rows["loss"],
        )
    ).sum(1)
    return sums[-1].clone(), torch.cat((sums[:-1], _sequence_sums(prepared).to(ratio.dtype), _extremes(ratio, live)))


def _extremes(ratio: Tensor, live: Tensor) -> Tensor:
    """Return the minimum and the maximum of the live ratios; 1 and 1 without one."""
    if not ratio.numel():
        return ratio.new_ones(2)
    low, high = torch.where(live, ratio, math.inf).amin(), torch.where(live, ratio, -math.inf).amax()
    return torch.where(live.any(), torch.stack((low, high)), 1.0)


def _sequence_sums(prepared: DenseLoss) -> Tensor:
    """Return the counts of sequences and unsafe ones, sum {C - d}^+ and lam times it, over those with a live token."""
    values, live, sequence = prepared.values, prepared.live, prepared.sequence
    row_hinge = torch.where(live, hinge(values["costs"], values["cost_limits"]), 0.0)
    count = max(prepared.sequences, 1)
    sequence_hinge = row_hinge.new_zeros(count).scatter_reduce(0, sequence, row_hinge, "amax")
    sequence_live = sequence_counts(live, sequence, count) > 0
    total = sequence_hinge.expand(2, -1).sum(-1)[0]  # two outputs, see `distributions.row_sum`
    return torch.stack((sequence_live.sum(), (sequence_hinge > 0).sum(), total, prepared.coef.lam * total))
