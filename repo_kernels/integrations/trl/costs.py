"""What the costs of a generation batch become: one cost per response, advantages, statistics, the next lambda."""

from __future__ import annotations

import torch
from torch import Tensor
from trl.trainer.utils import nanstd

from ...advantages import rectified_advantages
from ...penalty import lagrangian_lambda, repo_lambda
from ...safety import is_safe, rectified_cost
from .config import RePOConfig


def largest_costs(scores: Tensor) -> Tensor:
    """Return the largest cost of each response, (B, K) -> (B,); NaN stands for a function that does not apply.

    Raises ValueError if a response has no cost or an infinite one.
    """
    costs = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(1)
    if not bool(costs.isfinite().all()):
        row = int((~costs.isfinite()).nonzero()[0])
        raise ValueError(
            f"cost_funcs must give a finite cost for each completion, at least one of them; got {scores[row].tolist()} "
            f"for completion {row} of the batch"
        )
    return costs


def scaled_advantages(
    rewards: Tensor, costs: Tensor, lam: float, group_size: int, args: RePOConfig
) -> dict[str, Tensor]:
    """Return `advantages` A_R and `cost_advantages` A_C, (B,) each, of which the loss forms A_R - lam A_C.

    They are values minus the mean of their group, divided by the standard deviation of that combination plus 1e-4,
    over the group or the batch, as args.scale_rewards says; without cost A_R is GRPOTrainer's. A response whose reward
    is NaN gets A_R = 0.
    """
    signal = rectified_cost(costs, args.cost_limit) if args.cost_mode == "rectified" else costs
    of_reward, of_cost = (_centred(values, group_size) for values in (rewards, signal))
    combined = rectified_advantages(of_reward, of_cost, costs, lam, args.cost_mode, args.cost_limit)
    if args.scale_rewards == "group":
        deviation = nanstd(combined.view(-1, group_size), dim=1).repeat_interleave(group_size)
    else:
        deviation = nanstd(combined)
    scale = 1.0 if args.scale_rewards == "none" else deviation + 1e-4
    both = {"advantages": of_reward, "cost_advantages": of_cost}
    return {name: (values / scale).nan_to_num(nan=0.0) for name, values in both.items()}


def _centred(values: Tensor, group_size: int) -> Tensor:
    return values - values.view(-1, group_size).nanmean(1).repeat_interleave(group_size)


def statistics(costs: Tensor, limit: float) -> dict[str, float]:
    """Summarise costs (B,) under the names of the log; the gap is E{C - d}^+ - {E[C] - d}^+."""
    mean, excess = costs.mean(), rectified_cost(costs, limit).mean()
    return {
        "cost": mean.item(),
        "safe_rate": is_safe(costs, limit).float().mean().item(),
        "rectified_cost": excess.item(),
        "compensation_gap": (excess - rectified_cost(mean, limit)).item(),
    }


def next_lambda(lam: float, batch: dict[str, float], args: RePOConfig) -> float:
    """Move lambda by the statistics of the generation batch whose losses have used it."""
    if args.cost_mode == "lagrangian":
        return lagrangian_lambda(lam, batch["cost"], args.cost_limit, args.lam_lr, args.lam_max)
    return repo_lambda(lam, batch["rectified_cost"], args.lam_lr, args.lam_max)
