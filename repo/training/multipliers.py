"""The weights that move between steps: the penalty lambda and, if asked for, the KL weight beta.

Their rules are pure functions; `Multipliers` is the state that a run carries from step to step.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from typing import Any

from ..config.schema import AlgorithmConfig, PenaltyConfig

WINDOW = 128  # costs in the running mean of ppo_lagrangian


def repo_lambda(lam: float, rectified_cost: float, lr: float, maximum: float) -> float:
    """min(lambda + eta * mean {C - d}^+, lambda_max): never falls. Source: RePO, arXiv 2410.19933."""
    return min(lam + lr * rectified_cost, maximum)


def lagrangian_lambda(lam: float, mean_cost: float, cost_limit: float, lr: float, maximum: float) -> float:
    """exp(min(log lambda + eta * lambda * (mean C - d), log lambda_max)): Safe RLHF's dual step, arXiv 2310.12773."""
    log_lam = math.log(max(lam, sys.float_info.min))  # a huge negative step may have brought lambda to 0
    return math.exp(min(log_lam + lr * lam * (mean_cost - cost_limit), math.log(maximum)))


def adapted_beta(beta: float, kl: float, target: float) -> float:
    """beta (1 + 0.1 e), e = (KL - target) / target clipped to +-0.2. Source: Ziegler et al., arXiv 1909.08593."""
    return beta * (1 + 0.1 * max(-0.2, min(0.2, (kl - target) / target)))


class Multipliers:
    """The lambda (`lam`) and `beta` that the current step uses; `update` moves them once per rollout batch."""

    def __init__(self, algorithm: AlgorithmConfig, config: PenaltyConfig) -> None:
        self.algorithm, self.config = algorithm, config
        self.lam = 0.0 if algorithm.method in ("ppo", "crpo") else config.initial
        self.beta = algorithm.beta
        self.window: deque[float] = deque(maxlen=WINDOW)

    def update(self, costs: list[float], rectified_cost: float, kl: float = 0.0) -> None:
        """Move lambda by the costs of one global rollout batch, and beta by its KL in nats per token."""
        algorithm, config = self.algorithm, self.config
        if algorithm.method == "repo":
            self.lam = repo_lambda(self.lam, rectified_cost, config.lr, config.max)
        elif algorithm.method == "ppo_lagrangian":
            self.window.extend(costs)
            mean = sum(self.window) / len(self.window)
            self.lam = lagrangian_lambda(self.lam, mean, algorithm.cost_limit, config.lr, config.max)
        if algorithm.kl_target is not None and math.isfinite(kl):
            self.beta = adapted_beta(self.beta, kl, algorithm.kl_target)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"value": self.lam, "beta": self.beta, "window": list(self.window)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.lam, self.beta = float(state["value"]), float(state["beta"])
        self.window = deque(state["window"], maxlen=WINDOW)
