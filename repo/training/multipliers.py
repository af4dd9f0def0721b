"""Multipliers: the weights that change between steps, which are lambda of the cost and optionally beta of the KL.

Their rules are the pure functions of `repo_kernels.penalty`; `Multipliers` is the state that a run carries from step to
step, with the schedule of the cost limit that lambda moves by.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from repo_kernels.penalty import (
    adapted_beta,
    interior_point_lambda,
    lagrangian_lambda,
    projected_lambda,
    repo_lambda,
)

from ..config.schema import AlgorithmConfig, PenaltyConfig
from .limit import LimitSchedule

__all__ = [
    "WINDOW",
    "Multipliers",
    "adapted_beta",
    "interior_point_lambda",
    "lagrangian_lambda",
    "projected_lambda",
    "repo_lambda",
]

WINDOW = 128  # costs in the running mean of ppo_lagrangian


class Multipliers:
    """Holds the lambda (`lam`), `beta` and limit (`limits`) of the current step; `update` moves them once per batch.

    algorithm: method, cost limit, initial beta and target of the KL.
    config: initial value, learning rate and maximum of lambda, and the course of the limit.
    """

    def __init__(self, algorithm: AlgorithmConfig, config: PenaltyConfig) -> None:
        self.algorithm, self.config = algorithm, config
        self.lam = 0.0 if algorithm.method in ("ppo", "crpo") else config.initial
        self.beta = algorithm.beta
        self.window: deque[float] = deque(maxlen=WINDOW)
        self.limits = LimitSchedule(algorithm.cost_limit, config)
        self.weight = config.initial  # 1 / t of method interior_point

    def update(self, costs: list[float], rectified_cost: float, kl: float = 0.0) -> None:
        """Move lambda by the costs of one rollout batch over all processes, beta by its KL, and then the limit.

        costs: raw costs C of its responses. rectified_cost: mean of {C - d}^+ at the limit of the step. kl: nats per
        token; beta stays the same if it is not finite or algorithm.kl_target is None.
        """
        algorithm, config, limit = self.algorithm, self.config, self.limits.limit
        if algorithm.method in ("repo", "repo_dpo"):
            self.lam = repo_lambda(self.lam, rectified_cost, config.lr, config.max)
        elif algorithm.method == "ppo_lagrangian":
            self.window.extend(costs)
            mean = sum(self.window) / len(self.window)
            self.lam = lagrangian_lambda(self.lam, mean, limit, config.lr, config.max)
        elif algorithm.method == "cdpo":
            self.lam = projected_lambda(self.lam, sum(costs) / len(costs), limit, config.lr, config.max)
        elif algorithm.method == "interior_point":
            self.weight /= 1 + config.lr
            self.lam = interior_point_lambda(sum(costs) / len(costs), limit, self.weight, config.max)
        if algorithm.kl_target is not None and math.isfinite(kl):
            self.beta = adapted_beta(self.beta, kl, algorithm.kl_target)
        self.limits.update(costs)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {
            "value": self.lam,
            "beta": self.beta,
            "window": list(self.window),
            "weight": self.weight,
            "limit": self.limits.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, as state_dict returned it."""
        self.lam, self.beta = float(state["value"]), float(state["beta"])
        self.window = deque(state["window"], maxlen=WINDOW)
        if "limit" in state:  # checkpoints of earlier versions have neither
            self.weight = float(state["weight"])
            self.limits.load_state_dict(state["limit"])
