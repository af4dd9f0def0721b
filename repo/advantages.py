"""Advantages: pure functions from scores of grouped responses to what the loss multiplies the ratio with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantages:
    """Per response, (B,) fp32 each. cost is None where the method has no cost term; see `mode` of repo_loss."""

    reward: Tensor
    cost: Tensor | None
    combined: Tensor


def is_safe(costs: Tensor, cost_limit: float) -> Tensor:
    """C <= d per response, (B,) bool. d is rounded to fp32 as the costs are, so that C = d is safe everywhere."""
    return costs <= _fp32(cost_limit)


def rectified_cost(costs: Tensor, cost_limit: float) -> Tensor:
    """{C - d}^+ per response, (B,). Rectify each sample first; average afterwards."""
    return (costs - _fp32(cost_limit)).clamp_min(0)


def _fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def group_advantages(values: Tensor, group: Tensor) -> Tensor:
    """Leave-one-out: A_i = u_i - mean of the other u_j of the same prompt.

    values: (B,) float. group: (B,) int64, the prompt of each response. Returns (B,). Source: RLOO, arXiv 2402.14740.

    Raises:
        ValueError: a group with a single response, which has no baseline.
    """
    index, counts, totals = _group_sums(values, group)
    if bool((counts < 2).any()):
        raise ValueError("group_advantages needs at least 2 responses per prompt; a group has 1")
    others = (totals[index] - values) / (counts[index] - 1)
    return values - others


def divide_by_group_std(advantages: Tensor, group: Tensor) -> Tensor:
    """Combined advantages over their standard deviation in the group (ddof 0, + 1e-6), 0 where the deviation is 0."""
    index, counts, totals = _group_sums(advantages, group)
    deviation = advantages - (totals / counts)[index]
    variance = torch.zeros_like(totals).index_add_(0, index, deviation**2) / counts
    std = variance.sqrt()[index]
    return torch.where(std > 0, advantages / (std + 1e-6), torch.zeros_like(advantages))


def _group_sums(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(index into groups (B,), size of each group, sum of each group)."""
    _, index = group.unique(return_inverse=True)
    groups = int(index.max()) + 1 if index.numel() else 0
    zeros = torch.zeros(groups, dtype=values.dtype, device=values.device)
    return index, zeros.index_add(0, index, torch.ones_like(values)), zeros.index_add(0, index, values)


def rectified_advantages(
    reward: Tensor,
    cost: Tensor | None,
    costs: Tensor,
    lam: float,
    mode: str,
    cost_limit: float = 0.0,
    normalize: bool = False,
) -> Tensor:
    """A = A_R - lambda A_C, (B,); with mode "split" A_C counts on unsafe responses (C > d) only.

    reward, cost: (B,) advantages; in mode "rectified" cost is that of {C - d}^+. costs: (B,) raw costs C.
    normalize divides by 1 + lambda. Source: RePO, arXiv 2410.19933.
    """
    combined = reward
    if cost is not None:
        gated = torch.where(is_safe(costs, cost_limit), torch.zeros_like(cost), cost) if mode == "split" else cost
        combined = reward - lam * gated
    return combined / (1 + lam) if normalize else combined


def make_advantages(
    rewards: Tensor, costs: Tensor, group: Tensor, lam: float, mode: str | None, cost_limit: float, normalize: bool
) -> Advantages:
    """Leave-one-out advantages of both signals. mode None: reward only (PPO).

    The cost signal is {C - d}^+ in mode "rectified" and C in "split" and "lagrangian".
    """
    reward = group_advantages(rewards, group)
    if mode is None:
        return Advantages(reward, None, reward)
    signal = rectified_cost(costs, cost_limit) if mode == "rectified" else costs
    cost = group_advantages(signal, group)
    return Advantages(reward, cost, rectified_advantages(reward, cost, costs, lam, mode, cost_limit, normalize))
