"""Multipliers: the weights that change between steps, which are lambda of the cost and optionally beta of the KL.

Their rules are the pure functions of `repo_kernels.penalty`; `Multipliers` is the state that a run carries from step to
step.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from repo_kernels.penalty import adapted_beta, lagrangian_lambda, projected_lambda, repo_lambda

from ..config.schema import AlgorithmConfig, PenaltyConfig

__all__ = ["WINDOW", "Multipliers", "adapted_beta", "lagrangian_lambda", "projected_lambda", "repo_lambda"]

WINDOW = 128  # costs in the running mean of ppo_lagrangian


class Multipliers:
    """Holds the lambda (`lam`) and `beta` that the current step uses; `update` moves them once per rollout batch.

    algorithm: method, cost limit, initial beta and target of the KL.
    config: initial value, learning rate and maximum of lambda.
    """

    def __init__(self, algorithm: AlgorithmConfig, config: PenaltyConfig) -> None:
        self.algorithm, self.config = algorithm, config
        self.lam = 0.0 if algorithm.method in ("ppo", "crpo") else config.initial
        self.beta = algorithm.beta
        self.window: deque[float] = deque(maxlen=WINDOW)

    def update(self, costs: list[float], rectified_cost: float, kl: float = 0.0) -> None:
        """Move lambda by the costs of one rollout batch over all processes, and beta by its KL.

        costs: raw costs C of its responses. rectified_cost: mean of {C - d}^+. kl: nats per token; beta stays the same
        if it is not finite or algorithm.kl_target is None.
        """
        algorithm, config = self.algorithm, self.config
        if algorithm.method in ("repo", "repo_dpo"):
            self.lam = repo_lambda(self.lam, rectified_cost, config.lr, config.max)
        elif algorithm.method == "ppo_lagrangian":
            self.window.extend(costs)
            mean = sum(self.window) / len(self.window)
            self.lam = lagrangian_lambda(self.lam, mean, algorithm.cost_limit, config.lr, config.max)
        elif algorithm.method == "cdpo":
            mean = sum(costs) / len(costs)
            self.lam = projected_lambda(self.lam, mean, algorithm.cost_limit, config.lr, config.max)
        if algorithm.kl_target is not None and math.isfinite(kl):
            self.beta = adapted_beta(self.beta, kl, algorithm.kl_target)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"value": self.lam, "beta": self.beta, "window": list(self.window)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, as state_dict returned it."""
        self.lam, self.beta = float(state["value"]), float(state["beta"])
        self.window = deque(state["window"], maxlen=WINDOW)
