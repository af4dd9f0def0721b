"""Advantages as the configured method combines them, out of the pure functions of `repo_kernels.advantages`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from repo_kernels.advantages import (
    barrier_cost,
    cost_to_go,
    crpo_advantages,
    divide_by_group_std,
    gae,
    group_advantages,
    on_unsafe,
    rectified_advantages,
    token_signal,
)

from ..config.schema import AlgorithmConfig, CriticConfig
from ..scoring.safety import rectified_cost

__all__ = [
    "Advantages",
    "barrier_cost",
    "cost_to_go",
    "crpo_advantages",
    "divide_by_group_std",
    "gae",
    "group_advantages",
    "loss_mode",
    "method_advantages",
    "on_unsafe",
    "penalised_cost",
    "rectified_advantages",
    "token_signal",
]


@dataclass(frozen=True)
class Advantages:
    """Advantages of B responses: fp32, (B,) from groups or (B, R) of tokens, 0 after the end of each response.

    Critics give advantages to tokens. Learned credit gives them to tokens for the cost, and so for both combined.

    reward: advantages of the reward.
    cost: advantages of the cost; None if the method has no separate cost term.
    combined: advantages of reward and cost in one, as the method combines them.
    returns: by signal, (B, R) the targets of its critic; empty without critics.
    """

    reward: Tensor
    cost: Tensor | None
    combined: Tensor
    returns: dict[str, Tensor] = field(default_factory=dict)


def loss_mode(algorithm: AlgorithmConfig) -> str | None:
    """Return the cost_mode of repo_loss for a method; None for PPO and CRPO, which have no lambda.

    A barrier is "rectified" to the loss, which gets the advantages of the cost and never forms {C - d}^+ itself.
    """
    if algorithm.method in ("ppo", "crpo"):
        return None
    if algorithm.method != "repo":
        return "lagrangian"
    return "split" if algorithm.cost_mode == "split" else "rectified"


def penalised_cost(algorithm: AlgorithmConfig, costs: Tensor, limit: float) -> Tensor:
    """Return what the advantages of the cost are formed of, (B,): {C - d}^+, the barrier in its place, or C itself.

    costs: (B,) raw costs C. limit: d.
    """
    if loss_mode(algorithm) != "rectified":
        return costs
    if algorithm.cost_mode == "barrier":
        return barrier_cost(costs, limit, algorithm.barrier_tau, algorithm.barrier_margin)
    return rectified_cost(costs, limit)


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
    counted: Tensor | None = None,
    limit: float | None = None,
    shares: Tensor | None = None,
) -> Advantages:
    """Compute the advantages of reward and cost, and combine them as the configured method does.

    Args:
        algorithm: method, cost mode, cost limit and the placement of the KL.
        critic: gamma and gae_lambda.
        rewards, costs: (B,) raw scores.
        group: (B,) int64, the prompt of each response.
        mask: (B, R) bool, true on the tokens of each response, which begin in column 0.
        lam: lambda.
        log_ratio: (B, R) log pi_old - log pi_ref in nats; None unless the KL is placed in the reward.
        beta: weight of the KL.
        values: by signal, (B, R) the critics' values at sampling; None or empty for leave-one-out advantages.
        counted: (B,) bool, the responses that baselines are formed over; None: all. The others get advantages 0: in
            groups by this, with critics by their empty mask.
        limit: cost limit of the step; None: algorithm.cost_limit.
        shares: (B, R) what each token has of `penalised_cost`, by learned credit; None: the last token has all of it.
    """
    mode, limit = loss_mode(algorithm), algorithm.cost_limit if limit is None else limit
    cost_score = penalised_cost(algorithm, costs, limit)
    signals = {"reward": token_signal(rewards, mask, log_ratio, -beta)}
    if algorithm.method != "ppo":
        rest = cost_score if shares is None else cost_score - shares.sum(1)
        weight = beta if algorithm.kl_placement == "reward-and-cost" else 0.0
        signals["cost"] = token_signal(rest, mask, log_ratio, weight) + (0.0 if shares is None else shares)
    returns: dict[str, Tensor] = {}
    separate: dict[str, Tensor] = {}
    for name, signal in signals.items():
        if values:
            separate[name], returns[name] = gae(signal, values[name], mask, critic.gamma, critic.gae_lambda)
        elif name == "cost" and shares is not None:
            separate[name] = group_advantages(cost_to_go(signal.sum(1), shares), group, counted) * mask
        else:
            separate[name] = group_advantages(signal.sum(1), group, counted)
    reward, cost = separate["reward"], separate.get("cost")
    if algorithm.method == "crpo":
        assert cost is not None
        combined = crpo_advantages(reward, cost, costs, limit, algorithm.crpo_tolerance)
        return Advantages(reward, None, _scaled(algorithm, combined, group, counted), returns)
    by_token = reward[:, None] * mask if cost is not None and cost.ndim > reward.ndim else reward
    combined = rectified_advantages(by_token, cost, costs, lam, mode or "", limit, algorithm.normalize)
    return Advantages(reward, cost, _scaled(algorithm, combined, group, counted), returns)


def _scaled(algorithm: AlgorithmConfig, combined: Tensor, group: Tensor, counted: Tensor | None) -> Tensor:
    return divide_by_group_std(combined, group, counted) if algorithm.scale_by_std else combined
