"""Rules by which the weights of cost and KL change between steps: pure functions of numbers."""

from __future__ import annotations

import math
import sys


def repo_lambda(lam: float, rectified_cost: float, lr: float, maximum: float) -> float:
    """Raise lambda to min(lambda + lr * mean {C - d}^+, maximum); it never falls. The rule is RePO's, arXiv 2410.19933.

    Call it once a rollout batch, after the losses of the batch have used lambda: a lambda that moves before them weighs
    the batch by what it has just learnt from it.

    lam: lambda of the step. rectified_cost: mean of {C - d}^+ over the rollout batch of all processes, one number.

    Raises ValueError if rectified_cost is not reduced to one number.
    """
    if getattr(rectified_cost, "ndim", 0):
        shape = tuple(rectified_cost.shape)  # type: ignore[attr-defined]  # an array or tensor
        raise ValueError(f"rectified_cost must be one number, the mean over the batch; got shape {shape}")
    return min(lam + lr * float(rectified_cost), maximum)


def lagrangian_lambda(lam: float, mean_cost: float, cost_limit: float, lr: float, maximum: float) -> float:
    """Move lambda to exp(min(log lambda + lr * lambda * (mean C - d), log maximum)).

    This is the dual step of Safe RLHF, arXiv 2310.12773.

    lam: lambda of the step. mean_cost: running mean of C. cost_limit: d.
    """
    log_lam = math.log(max(lam, sys.float_info.min))  # a huge negative step may have brought lambda to 0
    return math.exp(min(log_lam + lr * lam * (mean_cost - cost_limit), math.log(maximum)))


def projected_lambda(lam: float, mean_cost: float, cost_limit: float, lr: float, maximum: float) -> float:
    """Move lambda to min([lambda + lr * (mean C - d)]^+, maximum).

    This is the dual step of constrained DPO, arXiv 2403.02475, which has no maximum; give infinity for none.

    lam: lambda of the step. mean_cost: mean of C over responses of the current policy. cost_limit: d.
    """
    return min(max(lam + lr * (mean_cost - cost_limit), 0.0), maximum)


def adapted_beta(beta: float, kl: float, target: float) -> float:
    """Return beta (1 + 0.1 e), where e = (KL - target) / target is clipped to [-0.2, 0.2].

    This is the controller of Ziegler et al., arXiv 1909.08593.

    kl, target: nats per token.
    """
    return beta * (1 + 0.1 * max(-0.2, min(0.2, (kl - target) / target)))
