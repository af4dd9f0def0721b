"""Weights that correct for a rollout engine whose log-probabilities differ from the trainer's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backends.codes import IGNORED
from .backends.eager.dense import row_sequences
from .backends.eager.terms import clamp_log_ratio, log_difference
from .backends.interface import ARGUMENTS, RowArguments
from .checks import (
    RATIO_LEVELS,
    VALUE_DTYPES,
    Scalar,
    check_choice,
    check_cu_seqlens,
    check_logps,
    check_mask,
    check_scalar,
    check_tensor,
)


@dataclass(frozen=True)
class RolloutWeights:
    """Truncated importance weights, and how many were cut.

    Args:
        weights: leading shape, dtype of `old_logps`; 1 on dead tokens. Pass them to a loss as `importance_weights`.
        cut: 0-d int64, live tokens, or sequences with a live token at level "sequence", whose ratio was above the cap.
        counted: 0-d int64, all live tokens or sequences with one.
    """

    weights: Tensor
    cut: Tensor
    counted: Tensor

    @property
    def cut_fraction(self) -> Tensor:
        """Share of what was counted that was cut; 0 without a live token."""
        return self.cut / self.counted.clamp_min(1)


def truncated_importance_weights(
    old_logps: Tensor,
    rollout_logps: Tensor,
    is_cap: Scalar,
    *,
    level: str = "token",
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> RolloutWeights:
    """Compute min(pi_old / pi_rollout, is_cap), for tokens that another engine sampled.

    The ratio of a token is exp(old_logps - rollout_logps), that of a sequence the product over its live tokens; every
    logarithm is clamped to +-20. Source: truncated importance sampling, Ionides 2008; for rollout engines
    fengyao.notion.site/off-policy-rl.

    Args:
        old_logps: (T,) of packed tokens or (B, L), fp32 or fp64: log-probabilities in nats that the trainer computes
            for the policy that sampled.
        rollout_logps: leading shape, fp32 or fp64: those that the rollout engine reported, at the same temperature and
            without truncation of the distribution.
        is_cap: a scalar > 0, the largest weight.
        level: "token", or "sequence": all tokens of a sequence have its weight.
        response_mask: leading shape, bool or 0 and 1: which tokens are live; None: all.
        cu_seqlens: (B + 1,) int32, bounds of packed sequences. Without it each packed token is a sequence.

    Returns:
        RolloutWeights; nothing in it has a gradient.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; the message names it.
    """
    old = check_logps(old_logps, "old_logps").detach()
    leading = tuple(old.shape)
    check_tensor("rollout_logps", rollout_logps, (leading,), VALUE_DTYPES, old)
    check_scalar("is_cap", is_cap, lambda x: x > 0, "> 0")
    check_choice("level", level, RATIO_LEVELS)
    if response_mask is not None:
        response_mask = check_mask(response_mask, leading, old)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, leading, old)
    ids = torch.zeros(leading, dtype=torch.int64, device=old.device)
    given = {"token_ids": ids, "response_mask": response_mask, "cu_seqlens": cu_seqlens}
    arguments = RowArguments(**(dict.fromkeys(ARGUMENTS) | given))  # type: ignore[arg-type]  # the rest is absent
    ids, sequence = row_sequences(arguments)
    live = ids != IGNORED
    log_ratio, _ = clamp_log_ratio(log_difference(old, rollout_logps.detach().to(old.dtype)).reshape(-1))
    counted = live
    if level == "sequence":
        count = max(arguments.sequences, 1)
        totals = log_ratio.new_zeros(count).index_add(0, sequence, torch.where(live, log_ratio, 0.0))
        counted = torch.zeros(count, dtype=torch.bool, device=old.device).index_put((sequence,), live, accumulate=True)
        log_ratio, _ = clamp_log_ratio(totals)
    ratio = log_ratio.exp()
    cut = (counted & (ratio > is_cap)).sum()
    weights = ratio.clamp_max(is_cap)
    if level == "sequence":
        weights = weights[sequence]
    return RolloutWeights(torch.where(live, weights, 1.0).view(leading), cut, counted.sum())
