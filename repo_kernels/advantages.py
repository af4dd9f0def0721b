"""Advantages: pure functions that turn scores of responses into the factors of the ratio in the loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import as_mask
from .renamed import renamed_arguments
from .safety import is_safe, round_limit


def group_advantages(values: Tensor, group: Tensor, counted: Tensor | None = None) -> Tensor:
    """Compute leave-one-out advantages: A_i = u_i - mean of the other u_j of the same prompt.

    This is the baseline of RLOO, arXiv 2402.14740.

    Args:
        values: (B,) float, the score u of each response; or (B, R), one for each of its tokens, whose baseline is the
            mean over the other responses in the same column.
        group: (B,) int64 or int32, the prompt of each response, in any numbers.
        counted: (B,) bool, or 0 and 1 in any integer or floating dtype; responses where it is false enter no mean and
            get 0, and so does a response that is the only counted one of its prompt. None: all count, and each prompt
            needs two.

    Returns:
        Advantages in the shape and dtype of `values`.

    Raises:
        ValueError: a group has a single response, which leaves no baseline, and `counted` is None; or a shape is wrong.
    """
    if counted is not None:
        counted = as_mask("counted", counted, group.shape)
        index, counts, totals = _group_sums(values, group, counted)
        counted = counted.reshape(counts[index].shape)
        others = (totals[index] - values) / (counts[index] - 1).clamp_min(1)
        return torch.where(counted & (counts[index] > 1), values - others, 0.0)
    index, counts, totals = _group_sums(values, group)
    if bool((counts < 2).any()):
        raise ValueError("group_advantages needs at least 2 responses per prompt; a group has 1")
    others = (totals[index] - values) / (counts[index] - 1)
    return values - others


def divide_by_group_std(advantages: Tensor, group: Tensor, counted: Tensor | None = None) -> Tensor:
    """Divide advantages by their standard deviation within the group plus 1e-6; return 0 where the deviation is 0.

    The deviation divides by the size n of the group, not by n - 1.

    Args:
        advantages: (B,) combined advantages.
        group: (B,) int64, the prompt of each response.
        counted: (B,), a mask as in `group_advantages`: the responses that the deviation is over; None: all.

    Returns:
        (B,) in the dtype of `advantages`.
    """
    if advantages.ndim != 1:
        raise ValueError(f"advantages must have shape (B,), one of each response; got {tuple(advantages.shape)}")
    counted = None if counted is None else as_mask("counted", counted, advantages.shape)
    index, counts, totals = _group_sums(advantages, group, counted)
    counts = counts.clamp_min(1)
    deviation = advantages - (totals / counts)[index]
    if counted is not None:
        deviation = torch.where(counted, deviation, 0.0)
    variance = torch.zeros_like(totals).index_add_(0, index, deviation**2) / counts
    std = variance.sqrt()[index]
    return torch.where(std > 0, advantages / (std + 1e-6), torch.zeros_like(advantages))


def _group_sums(values: Tensor, group: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the index of each value's group (B,), and the size and the sum of each group, of counted values.

    Size and sum are (G,), or for values (B, R) of tokens (G, 1) and (G, R).
    """
    if values.ndim not in (1, 2) or group.shape != values.shape[:1]:
        shapes = f"{tuple(values.shape)} and {tuple(group.shape)}"
        raise ValueError(f"values must have shape (B,) or (B, R) and group shape (B,), for B responses; got {shapes}")
    _, index = group.unique(return_inverse=True)
    groups = int(index.max()) + 1 if index.numel() else 0
    each = values[:, :1] if values.ndim == 2 else values  # one number for each response
    if counted is not None:
        counted = counted.reshape(each.shape)
    ones = torch.ones_like(each) if counted is None else counted.to(values.dtype)
    summed = values if counted is None else torch.where(counted, values, 0.0)
    sizes, sums = (x.new_zeros(groups, *x.shape[1:]).index_add(0, index, x) for x in (ones, summed))
    return index, sizes, sums


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
    """Combine advantages: A = A_R - lambda A_C, where cost_mode "split" sets A_C to 0 on safe responses (C <= d).

    These are the advantages of RePO, arXiv 2410.19933.

    Args:
        reward: (B,) or (B, R), A_R.
        cost: A_C in the shape of `reward`, computed from {C - d}^+ with cost_mode "rectified", else from C; None for 0.
        costs: (B,) raw costs C.
        lam: lambda.
        cost_mode: "rectified", "split" or "lagrangian".
        cost_limit: d.
        normalize: divide the result by 1 + lambda.

    Returns:
        Combined advantages in the shape of `reward`.
    """
    combined = reward
    if cost is not None:
        combined = reward - lam * (on_unsafe(cost, costs, cost_limit) if cost_mode == "split" else cost)
    return combined / (1 + lam) if normalize else combined


def on_unsafe(cost: Tensor, costs: Tensor, cost_limit: float) -> Tensor:
    """Set cost advantages (B,) or (B, R) to 0 on safe responses. costs: (B,) raw costs C."""
    safe = is_safe(costs, cost_limit).reshape(-1, *[1] * (cost.ndim - 1))
    return cost.masked_fill(safe, 0.0)


def barrier_cost(costs: Tensor, cost_limit: float, tau: float, margin: float = 0.0) -> Tensor:
    """Compute the soft barrier tau softplus((C - d + margin) / tau), which takes the place of {C - d}^+.

    Its slope in C is sigmoid((C - d + margin) / tau), so that a response is pushed away from the limit before it has
    reached it. It exceeds {C - d + margin}^+ by tau log 2 where C = d - margin, and by less elsewhere; as tau -> 0 with
    margin 0 it becomes RePO's {C - d}^+. On a finite set of answers the optimum for a fixed lambda is pi ~ pi_ref
    exp((R - lambda barrier) / beta). The softplus in this place is ours, after the soft barriers of arXiv 2209.15090.

    Args:
        costs: (B,) float, raw costs C.
        cost_limit: d.
        tau: width of the barrier in units of the cost, > 0 however small.
        margin: distance below d from which the cost counts, in units of the cost, >= 0.

    Returns:
        (B,) in the dtype of `costs`, computed in fp64.

    Raises:
        ValueError: tau or margin is out of range.
    """
    if not 0 < tau < math.inf:
        raise ValueError(f"tau must be finite and > 0; got {tau!r}")
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be finite and >= 0; got {margin!r}")
    excess = costs.double() - round_limit(cost_limit) + margin
    # {z}+ + tau log(1 + exp(-|z| / tau)): no exponent is positive, and a tiny tau leaves {z}+
    return (excess.clamp_min(0) + tau * torch.log1p(torch.exp(-excess.abs() / tau))).to(costs.dtype)


def crpo_advantages(reward: Tensor, cost: Tensor, costs: Tensor, cost_limit: float, tolerance: float) -> Tensor:
    """Return A_R if the batch's mean cost is <= d + tolerance, else -A_C, as CRPO does (arXiv 2011.05869).

    Args:
        reward, cost: A_R and A_C, (B,) or (B, R).
        costs: (B,) raw costs C.
        cost_limit: d.
        tolerance: excess of the mean cost over d that is accepted, >= 0.

    Returns:
        Advantages, `reward` or -`cost`.
    """
    return reward if bool(costs.mean() <= cost_limit + tolerance) else -cost


def token_signal(scores: Tensor, mask: Tensor, log_ratio: Tensor | None = None, weight: float = 0.0) -> Tensor:
    """Compute u_t = score 1[t is the last token] + weight k_t, where k_t = log pi_old - log pi_ref of the token.

    The sum of k_t over a response estimates the KL of its sequence. Source: Safe RLHF, arXiv 2310.12773.

    Args:
        scores: (B,) score of each response.
        mask: (B, R) bool, or 0 and 1 in any integer or floating dtype: true on the tokens of each response, which begin
            in column 0.
        log_ratio: (B, R) k_t in nats; None leaves the KL out.
        weight: -beta places the KL in the reward, +beta in the cost.

    Returns:
        (B, R) fp32, 0 where the mask is false.
    """
    mask = as_mask("mask", mask)
    last = (mask.sum(1) - 1).clamp_min(0)
    signal = torch.zeros(mask.shape, dtype=torch.float32, device=scores.device)
    signal[torch.arange(len(scores)), last] = scores.float()
    return signal if log_ratio is None else signal + weight * torch.where(mask, log_ratio, 0.0)


def cost_to_go(costs: Tensor, shares: Tensor) -> Tensor:
    """Compute the cost-to-go of each token, when shares of the cost have been redistributed to tokens:

        u_t = C - sum_{s < t} g_s

    It takes the place of C where each token is to answer only for the cost that follows it. The part of C that no token
    has a share of counts for every token. If g_s does not depend on tokens after s, the sum is a baseline that depends
    on the prefix alone, and the policy gradient with u_t is that with C, whatever the shares are (losses summed over
    tokens). Source: return redistribution, RUDDER, arXiv 1806.07857; that the rest stays whole is ours.

    Args:
        costs: (B,) float, C of each response.
        shares: (B, R), g of each token, 0 after the end of each response.

    Returns:
        (B, R) in the dtype of `shares`; after a response's end C less all of its shares.

    Raises:
        ValueError: a shape is wrong.
    """
    if shares.ndim != 2 or costs.shape != shares.shape[:1]:
        shapes = f"{tuple(costs.shape)} and {tuple(shares.shape)}"
        raise ValueError(f"costs must have shape (B,) and shares shape (B, R), for B responses; got {shapes}")
    return costs.to(shares.dtype)[:, None] - (shares.cumsum(1) - shares)


@renamed_arguments(discount="gamma", trace="gae_lambda")
def gae(
    signals: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantage estimates, from the last token to the first, in fp32:

        delta_t = u_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma gae_lambda A_{t+1},  G_t = A_t + V_t

    where V and A are 0 after the last token. Source: arXiv 1506.02438.

    Args:
        signals: (B, R) reward or cost u_t of each token.
        values: (B, R) V_t, the critic's value before token t.
        mask: (B, R), as in `token_signal`.
        gamma: discount factor in [0, 1].
        gae_lambda: decay of the trace in [0, 1]; 0 uses the next value only, 1 the whole rest of the response.

    Returns:
        (advantages A, returns G), both (B, R) fp32, 0 where the mask is false.
    """
    mask = as_mask("mask", mask, signals.shape)
    u, v = (torch.where(mask, x.float(), 0.0) for x in (signals, values))
    advantages = torch.zeros_like(u)
    following = following_value = torch.zeros_like(u[:, 0])
    for t in range(u.shape[1] - 1, -1, -1):
        delta = u[:, t] + gamma * following_value - v[:, t]
        following = torch.where(mask[:, t], delta + gamma * gae_lambda * following, 0.0)
        following_value = v[:, t]
        advantages[:, t] = following
    return advantages, torch.where(mask, advantages + v, 0.0)
