"""Advantages: pure functions from scores of responses to what the loss multiplies the ratio with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..common.renamed import renamed_arguments
from ..config.schema import AlgorithmConfig, CriticConfig
from ..scoring.safety import is_safe, rectified_cost


@dataclass(frozen=True)
class Advantages:
    """fp32, (B,) per response from groups, (B, R) per token from critics, 0 beyond each response.

    cost is None where the method has no cost term; see `mode` of repo_loss. returns: by signal, (B, R) what its critic
    should have said.
    """

    reward: Tensor
    cost: Tensor | None
    combined: Tensor
    returns: dict[str, Tensor] = field(default_factory=dict)


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


@renamed_arguments(mode="cost_mode")
def rectified_advantages(
    reward: Tensor,
    cost: Tensor | None,
    costs: Tensor,
    lam: float,
    cost_mode: str,
    cost_limit: float = 0.0,
    normalize: bool = False,
) -> Tensor:
    """A = A_R - lambda A_C; with mode "split" A_C counts on unsafe responses (C > d) only.

    reward, cost: (B,) or (B, R) advantages; in mode "rectified" cost is that of {C - d}^+. costs: (B,) raw costs C.
    normalize divides by 1 + lambda. Source: RePO, arXiv 2410.19933.
    """
    combined = reward
    if cost is not None:
        safe = is_safe(costs, cost_limit).reshape(-1, *[1] * (cost.ndim - 1))
        gated = cost.masked_fill(safe, 0.0) if cost_mode == "split" else cost
        combined = reward - lam * gated
    return combined / (1 + lam) if normalize else combined


def crpo_advantages(reward: Tensor, cost: Tensor, costs: Tensor, cost_limit: float, tolerance: float) -> Tensor:
    """A_R while the batch's mean cost is <= d + tolerance, else -A_C. Costs (B,), advantages
    (B,) or (B, R). Source: CRPO, arXiv 2011.05869."""
    return reward if bool(costs.mean() <= cost_limit + tolerance) else -cost


def token_signal(scores: Tensor, mask: Tensor, log_ratio: Tensor | None = None, weight: float = 0.0) -> Tensor:
    """u_t = score 1[last token] + weight k_t, k_t = log pi_old - log pi_ref of the sampled token.

    weight -beta places the KL in the reward, +beta in the cost; summed over tokens, k_t is the sequence KL's estimate.
    scores: (B,). mask: (B, R) bool, responses begin in column 0. log_ratio: (B, R) k_t in nats. Returns (B, R) fp32.
    Source: Safe RLHF, arXiv 2310.12773.
    """
    last = (mask.sum(1) - 1).clamp_min(0)
    signal = torch.zeros(mask.shape, dtype=torch.float32, device=scores.device)
    signal[torch.arange(len(scores)), last] = scores.float()
    return signal if log_ratio is None else signal + weight * torch.where(mask, log_ratio, 0.0)


@renamed_arguments(discount="gamma", trace="gae_lambda")
def gae(
    signals: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates, right to left in fp32: delta_t = u_t + gamma V_{t+1} - V_t,
    A_t = delta_t + gamma lambda A_{t+1}, G_t = A_t + V_t; V and A are 0 after the last token.

    signals: (B, R) reward or cost u_t at each token. values: (B, R) V_t, the critic before token t. mask: (B, R) bool,
    true on the tokens of each response, which begin in column 0. gamma, gae_lambda: in [0, 1].
    Returns (advantages, returns), (B, R) fp32, 0 where the mask is false. Source: arXiv 1506.02438.
    """
    u, v = (torch.where(mask, x.float(), 0.0) for x in (signals, values))
    advantages = torch.zeros_like(u)
    following = following_value = torch.zeros_like(u[:, 0])
    for t in range(u.shape[1] - 1, -1, -1):
        delta = u[:, t] + gamma * following_value - v[:, t]
        following = torch.where(mask[:, t], delta + gamma * gae_lambda * following, 0.0)
        following_value = v[:, t]
        advantages[:, t] = following
    return advantages, torch.where(mask, advantages + v, 0.0)


def loss_mode(algorithm: AlgorithmConfig) -> str | None:
    """The mode of repo_loss: how the cost enters the advantage; None for PPO and CRPO, which have no lambda."""
    if algorithm.method in ("ppo", "crpo"):
        return None
    return algorithm.cost_mode if algorithm.method == "repo" else "lagrangian"


def method_advantages(
    algorithm: AlgorithmConfig,
    critic: CriticConfig,
    rewards: Tensor,
    costs: Tensor,
    group: Tensor,
    mask: Tensor,
    lam: float,
    log_ratio: Tensor | None = None,
    beta: float = 0.0,
    values: Mapping[str, Tensor] | None = None,
) -> Advantages:
    """Advantages of both signals, combined as the configured method does.

    rewards, costs, group: (B,). mask: (B, R) bool. log_ratio: (B, R) k_t where the KL is placed in the reward, with
    weight beta. values: by signal, (B, R) what the critics said at sampling; empty or None: leave-one-out.
    """
    mode, limit = loss_mode(algorithm), algorithm.cost_limit
    cost_score = rectified_cost(costs, limit) if mode == "rectified" else costs
    signals = {"reward": token_signal(rewards, mask, log_ratio, -beta)}
    if algorithm.method != "ppo":
        signals["cost"] = token_signal(
            cost_score, mask, log_ratio, beta if algorithm.kl_placement == "reward-and-cost" else 0.0
        )
    returns: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, signal in signals.items():
        if values:
            found[name], returns[name] = gae(signal, values[name], mask, critic.gamma, critic.gae_lambda)
        else:
            found[name] = group_advantages(signal.sum(1), group)
    reward, cost = found["reward"], found.get("cost")
    if algorithm.method == "crpo":
        assert cost is not None
        combined = crpo_advantages(reward, cost, costs, limit, algorithm.crpo_tolerance)
        return Advantages(reward, None, _scaled(algorithm, combined, group), returns)
    combined = rectified_advantages(reward, cost, costs, lam, mode or "", limit, algorithm.normalize)
    return Advantages(reward, cost, _scaled(algorithm, combined, group), returns)


def _scaled(algorithm: AlgorithmConfig, combined: Tensor, group: Tensor) -> Tensor:
    return divide_by_group_std(combined, group) if algorithm.scale_by_std else combined
