"""The sum of the rows of a loss: the loss itself and its statistics."""

from __future__ import annotations

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
    flags, log_ratio = results.flags[live], rows["log_ratio"]
    ratio, unsafe = log_ratio.exp(), (flags & UNSAFE) != 0
    low, high = (flags & CLIPPED_LOW) != 0, (flags & CLIPPED_HIGH) != 0
    counts = (torch.ones_like(unsafe), unsafe, low & ~unsafe, low & unsafe, high & ~unsafe, high & unsafe)
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
    extremes = torch.stack((ratio.amin(), ratio.amax())) if ratio.numel() else ratio.new_ones(2)
    stats = torch.cat((sums[:-1], _sequence_sums(prepared, live).to(ratio.dtype), extremes))
    return sums[-1].clone(), stats


def _sequence_sums(prepared: DenseLoss, live: Tensor) -> Tensor:
    """Return the counts of sequences and unsafe ones, sum {C - d}^+ and lam times it, over those with a live token."""
    values, sequence = prepared.values, prepared.sequence[live]
    row_hinge = hinge(values["costs"], values["cost_limits"])[live]
    sequence_hinge = row_hinge.new_zeros(prepared.sequences).scatter_reduce(0, sequence, row_hinge, "amax")
    sequence_live = sequence_counts(live, prepared.sequence, prepared.sequences) > 0
    total = sequence_hinge.expand(2, -1).sum(-1)[0]  # two outputs, see `distributions.row_sum`
    return torch.stack((sequence_live.sum(), (sequence_hinge > 0).sum(), total, prepared.coef.lam * total))
