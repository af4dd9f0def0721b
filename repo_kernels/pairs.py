"""Pairs: learn which of two responses is better from their rewards and costs (constrained DPO and its rectified form).

    utilities = penalised_rewards(rewards, costs, lam=2.0)            # (N, 2)
    out = pair_loss(logps - ref_logps, soft_labels(utilities), beta=0.1)
    out.losses.mean().backward()

The minimum over all pairs of responses is the policy proportional to pi_ref exp(utility / beta). Source of the
constrained form: arXiv 2403.02475; DPO: arXiv 2305.18290. The rectified form penalises {C - d}^+ instead of C - d, as
RePO does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_choice
from .safety import rectified_cost, round_limit

COST_MODES = ("rectified", "lagrangian")


class PairLoss(NamedTuple):
    """Result of `pair_loss`: (N,) each, in the dtype of the log-ratios.

    losses: in nats, differentiable in the log-ratios.
    margins: beta times the difference of the log-ratios, positive if the policy has moved towards the better response
        of the pair; 0 where neither is better. Without gradient.
    correct: 1 where the policy has moved towards the better response, 0 where away from it, 0.5 where it has not moved
        or neither is better. Without gradient.
    """

    losses: Tensor
    margins: Tensor
    correct: Tensor


def penalised_rewards(
    rewards: Tensor, costs: Tensor, lam: float | Tensor, cost_limit: float = 0.0, cost_mode: str = "rectified"
) -> Tensor:
    """Compute the utility of each response: R - lambda {C - d}^+, or R - lambda (C - d) in mode lagrangian.

    Args:
        rewards, costs: R and C, float tensors of one shape.
        lam: lambda >= 0, a number or a 0-d tensor.
        cost_limit: d, in units of the cost.
        cost_mode: "rectified", in which no response earns anything by a cost below the limit, or "lagrangian", the
            form of constrained DPO, arXiv 2403.02475.

    Returns:
        Utilities in the shape of `rewards`.

    Raises:
        ValueError: the shapes differ, or the mode is unknown.
    """
    check_choice("cost_mode", cost_mode, COST_MODES)
    if rewards.shape != costs.shape:
        raise ValueError(f"costs must have the shape of rewards, {tuple(rewards.shape)}; got {tuple(costs.shape)}")
    excess = rectified_cost(costs, cost_limit) if cost_mode == "rectified" else costs - round_limit(cost_limit)
    return rewards - lam * excess


def soft_labels(utilities: Tensor) -> Tensor:
    """Compute p = sigmoid(u_1 - u_2), the probability that the first response of each pair is the better one.

    This is the model of Bradley and Terry. utilities: (N, 2) float. Returns (N,). Raises ValueError for another shape.
    """
    _check_pairs("utilities", utilities)
    return torch.sigmoid(utilities[:, 0] - utilities[:, 1])


def pair_loss(log_ratios: Tensor, labels: Tensor, beta: float) -> PairLoss:
    """Compute -p log sigmoid(beta D) - (1 - p) log sigmoid(-beta D) of each pair, where D is the difference of ratios.

    With hard labels this is DPO's loss, arXiv 2305.18290. The derivative by beta D is sigmoid(beta D) - p, so that the
    loss is least where the policy agrees with the label.

    Args:
        log_ratios: (N, 2) fp32 or fp64, log pi - log pi_ref of both responses of each pair, in nats, summed over the
            tokens of a response. Subtract token by token and sum then: two sums of hundreds of nats lose digits.
        labels: (N,) p in [0, 1], the probability that the first response is the better one.
        beta: weight of KL(pi || pi_ref), > 0.

    Returns:
        Losses, margins and whether they are right; see `PairLoss`.

    Raises:
        ValueError: a shape is wrong, or beta is not > 0.
    """
    _check_pairs("log_ratios", log_ratios)
    if labels.shape != log_ratios.shape[:1]:
        raise ValueError(f"labels must have shape ({len(log_ratios)},), one a pair; got {tuple(labels.shape)}")
    if not beta > 0:
        raise ValueError(f"beta must be > 0, since at 0 the loss does not depend on the policy; got {beta!r}")
    labels = labels.to(log_ratios)
    scaled = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    losses = -labels * F.logsigmoid(scaled) - (1 - labels) * F.logsigmoid(-scaled)
    margins = scaled.detach() * (labels - 0.5).sign()
    return PairLoss(losses, margins, (1 + margins.sign()) / 2)


def _check_pairs(name: str, value: Tensor) -> None:
    if value.ndim != 2 or value.shape[1] != 2:
        raise ValueError(f"{name} must have shape (N, 2), both responses of each pair; got {tuple(value.shape)}")
