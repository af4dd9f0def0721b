"""Rules by which the weights of cost and KL, and the cost limit, change between steps: pure functions of numbers."""

from __future__ import annotations

import math
import sys

LEAST_SLACK = 1e-3  # units of the cost, far below the standard error of a batch's mean


def repo_lambda(lam: float, rectified_cost: float, lr: float, maximum: float) -> float:
    """Raise lambda to min(lambda + lr * mean {C - d}^+, maximum); it never falls. The rule is RePO's, arXiv 2410.19933.

    Call it once a rollout batch, after the losses of the batch have used lambda: a lambda that moves before them weighs
    the batch by what it has just learnt from it.

    lam: lambda of the step. rectified_cost: mean of {C - d}^+ over the rollout batch of all processes, one number. lr:
    step size, >= 0. maximum: upper bound of lambda.

    Raises ValueError if rectified_cost is not one finite number >= 0.
    """
    if getattr(rectified_cost, "ndim", 0):
        shape = tuple(rectified_cost.shape)  # type: ignore[attr-defined]  # an array or tensor
        raise ValueError(f"rectified_cost must be one number, the mean over the batch; got shape {shape}")
    if not 0 <= float(rectified_cost) < math.inf:
        raise ValueError(f"rectified_cost must be finite and >= 0, the mean of {{C - d}}^+; got {rectified_cost!r}")
    return min(lam + lr * float(rectified_cost), maximum)


def lagrangian_lambda(lam: float, mean_cost: float, cost_limit: float, lr: float, maximum: float) -> float:
    """Move lambda to exp(min(log lambda + lr * lambda * (mean C - d), log maximum)).

    This is the dual step of Safe RLHF, arXiv 2310.12773.

    lam: lambda of the step. mean_cost: running mean of C. cost_limit: d. lr: step size, >= 0. maximum: upper bound of
    lambda, > 0.
    """
    log_lam = math.log(max(lam, sys.float_info.min))  # a huge negative step may have brought lambda to 0
    return math.exp(min(log_lam + lr * lam * (mean_cost - cost_limit), math.log(maximum)))


def projected_lambda(lam: float, mean_cost: float, cost_limit: float, lr: float, maximum: float) -> float:
    """Move lambda to min([lambda + lr * (mean C - d)]^+, maximum).

    This is the dual step of constrained DPO, arXiv 2403.02475, which has no maximum; give infinity for none.

    lam: lambda of the step. mean_cost: mean of C over responses of the current policy. cost_limit: d. lr: step size,
    >= 0. maximum: upper bound of lambda.
    """
    return min(max(lam + lr * (mean_cost - cost_limit), 0.0), maximum)


def adapted_beta(beta: float, kl: float, target: float) -> float:
    """Return beta (1 + 0.1 e), where e = (KL - target) / target is clipped to [-0.2, 0.2].

    This is the controller of Ziegler et al., arXiv 1909.08593.

    kl, target: nats per token.
    """
    return beta * (1 + 0.1 * max(-0.2, min(0.2, (kl - target) / target)))


def interior_point_lambda(
    mean_cost: float, cost_limit: float, weight: float, maximum: float, least_slack: float = LEAST_SLACK
) -> float:
    """Return min(weight / max(d - mean C, least_slack), maximum), or maximum where mean C > d.

    With weight 1 / t this is the lambda for which the gradient of -lambda E[C] is that of the logarithmic barrier
    log(d - E[C]) / t. The weight shrinks from step to step, which makes the barrier steeper: its optimum approaches
    that of the constraint E[C] <= d. The barrier is that of IPO, arXiv 1910.09615; the bound beyond the limit, where
    the logarithm is not defined, is that of OmniSafe's implementation.

    mean_cost: mean of C over the batch. cost_limit: d. weight: of the barrier, >= 0, in units of the reward. maximum:
    bound of lambda. least_slack: least distance from the limit that is divided by, > 0, in units of the cost.
    """
    if mean_cost > cost_limit:
        return maximum
    return min(weight / max(cost_limit - mean_cost, least_slack), maximum)


def linear_limit(start: float, end: float, step: int, steps: int) -> float:
    """Return the cost limit of a step on the line from `start` in step 0 to `end` in step `steps`, and `end` after it.

    A budget that shrinks during training is the idea of Simmer, arXiv 2206.02675; the line is ours.
    """
    return end if step >= steps else start + (end - start) * step / steps


def pi_limit(
    limit: float,
    total: float,
    error: float,
    proportional: float,
    integral: float,
    most: float,
    bounds: tuple[float, float],
) -> tuple[float, float]:
    """Return the next cost limit clip(d_k - K_p e_k - K_i S_k, *bounds) and S_k = clip(S_{k-1} + e_k, -most, most).

    The limit tightens while responses meet it (e_k > 0) and gives way where they do not. The scheduler with
    proportional and integral gains is that of Simmer, arXiv 2206.02675, where it sets the safety budget.

    limit: d_k. total: S_{k-1}, 0 at first. error: e_k = target - share of unsafe responses at d_k. proportional,
    integral: gains K_p, K_i in units of the cost. most: bound of the sum, so that a long time at one of the bounds does
    not delay the limit's return. bounds: lowest and highest limit.
    """
    total = max(-most, min(most, total + error))
    lowest, highest = bounds
    return max(lowest, min(highest, limit - proportional * error - integral * total)), total
