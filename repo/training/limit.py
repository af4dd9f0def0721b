"""Limit schedule: the cost limit d_k that training uses in step k, which ends at the limit d of the run.

A limit that begins where the reference already is lets the penalty act from the first step on few responses, and
tightens as the policy gets safer (Simmer, arXiv 2206.02675). Its rules are pure functions of `repo_kernels.penalty`;
`LimitSchedule` is the state that a run carries from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from repo_kernels.penalty import linear_limit, pi_limit

from ..config.schema import PenaltyConfig
from ..scoring.safety import is_safe, rectified_cost

START_QUANTILE = 0.9
"""Quantile of the first batch's costs at which a schedule begins."""
TARGET = 1 - START_QUANTILE
"""Share of unsafe responses up to which pi tightens: that of the start, so that the controller begins at rest."""
PROPORTIONAL, WINDUP = 0.5, 10
"""pi: share of the full speed that the last batch decides, and batches whose errors the sum can hold.

The sum decides the other half of the speed: 16 responses resolve the share of unsafe ones only to 6 %, so that a single
batch must not decide alone. Full speed is limit_start - d in limit_steps steps; it needs WINDUP batches without an
unsafe response. The sum never outweighs one such batch, so that the limit turns as soon as batches do."""
INTEGRAL = (1 - PROPORTIONAL) / WINDUP


class LimitSchedule:
    """Holds the cost limit of the step; `begin` sets the first one and `update` moves it, once per rollout batch.

    cost_limit: the limit d of the run. config: course, first limit and number of steps.
    """

    def __init__(self, cost_limit: float, config: PenaltyConfig) -> None:
        self.final, self.config = cost_limit, config
        self.limit = cost_limit
        self.start: float | None = None  # unknown until the first batch is scored
        self.step, self.total = 0, 0.0

    @property
    def moves(self) -> bool:
        """Tell whether the limit is another than d in some step."""
        return self.config.limit_schedule != "constant"

    def begin(self, costs: Tensor) -> float:
        """Return the limit of the step. costs: (B,) raw costs of its batch, which the first step's limit may come from.

        The policy that samples the first batch is the reference.
        """
        if self.moves and self.start is None:
            given = self.config.limit_start
            start = costs.double().quantile(START_QUANTILE).item() if given is None else given
            self.limit = self.start = max(start, self.final)
        return self.limit

    def measure(self, costs: Tensor) -> dict[str, float]:
        """Return the metrics of the step's limit, which need not be d; none where the schedule is constant.

        costs: (B,) raw costs. limit: the limit d_k of the step. limit_rectified_cost: mean {C - d_k}^+, by which
        lambda moves. limit_unsafe_rate: share of C > d_k, by which pi moves the limit.
        """
        if not self.moves:
            return {}
        costs = costs.double()
        return {
            "limit": self.limit,
            "limit_rectified_cost": rectified_cost(costs, self.limit).mean().item(),
            "limit_unsafe_rate": self._unsafe_rate(costs.tolist()),
        }

    def update(self, costs: Sequence[float]) -> None:
        """Move the limit after a step that `begin` began. costs: raw costs of its batch over all processes."""
        if not self.moves or self.start is None:
            return
        self.step += 1
        steps, span = self.config.limit_steps, self.start - self.final
        if self.config.limit_schedule == "linear":
            self.limit = linear_limit(self.start, self.final, self.step, steps)
        else:
            speed = span / (TARGET * steps)  # in units of the cost, per step and unit of the error
            self.limit, self.total = pi_limit(
                self.limit,
                self.total,
                TARGET - self._unsafe_rate(costs),
                PROPORTIONAL * speed,
                INTEGRAL * speed,
                WINDUP * TARGET,
                (self.final, self.start),
            )

    def _unsafe_rate(self, costs: Sequence[float]) -> float:
        return sum(not is_safe(cost, self.limit) for cost in costs) / len(costs)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"limit": self.limit, "start": self.start, "step": self.step, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, as state_dict returned it, unless the limit is constant from now on."""
        if not self.moves:
            return
        self.limit, self.start, self.step, self.total = (state[k] for k in ("limit", "start", "step", "total"))
