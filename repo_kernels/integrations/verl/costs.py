"""The costs of a batch: advantages, statistics, and the multiplier that moves after the losses of the batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...advantages import rectified_advantages
from ...checks import check_scalar
from ...penalty import repo_lambda
from ...safety import is_safe, rectified_cost

STATE = "repo_state.json"  # beside verl's data.pt in a checkpoint


@dataclass(frozen=True, kw_only=True)
class CostSettings:
    """The section `trainer.v1.repo` of verl's configuration, checked when it is made.

    Args:
        cost_key: key of the cost in the dict that the reward function returns.
        cost_limit: d, in units of the cost: a response is safe iff C <= d.
        lam_init: lambda of the first batch, in [0, lam_max].
        lam_lr: lambda grows by lam_lr * mean {C - d}^+ after each batch; >= 0, 0 keeps it.
        lam_max: upper bound of lambda, > 0.

    Raises:
        TypeError, ValueError: a field has a wrong type or value. The message names it.
    """

    cost_key: str = "cost"
    cost_limit: float = 0.0
    lam_init: float = 1.0
    lam_lr: float = 0.1
    lam_max: float = 5.0

    def __post_init__(self) -> None:
        if not isinstance(self.cost_key, str):
            raise TypeError(f"cost_key must be a string; got {self.cost_key!r}")
        check_scalar("cost_limit", self.cost_limit, lambda x: True, "finite")
        check_scalar("lam_lr", self.lam_lr, lambda x: x >= 0, ">= 0")
        check_scalar("lam_max", self.lam_max, lambda x: x > 0, "> 0")
        most = f">= 0 and <= lam_max = {self.lam_max}"
        check_scalar("lam_init", self.lam_init, lambda x: 0 <= x <= self.lam_max, most)


class CostConstraint:
    """Lambda, and the costs of the batch that is trained on.

    For each batch: `begin` with its costs, `advantages`, the losses, `finish`. Lambda moves in `finish` only.
    """

    def __init__(self, settings: CostSettings) -> None:
        self.settings, self.lam = settings, settings.lam_init
        self.costs: Tensor | None = None
        self.counted: Tensor | None = None

    def begin(self, infos: Sequence[Mapping[str, Any]], padding: Sequence[bool]) -> dict[str, float]:
        """Take the costs of a batch and return its entries of the log, under `repo/`; `repo/lam` is what it will use.

        infos: what the reward function returned for each response. padding: which rows are verl's synthetic ones, whose
        cost is a copy and does not count. Raises ValueError for a response without a finite cost.
        """
        self.costs = torch.tensor([self._cost(info) for info in infos], dtype=torch.float32)
        self.counted = ~torch.tensor(padding, dtype=torch.bool)
        costs, limit = self.costs[self.counted], self.settings.cost_limit
        mean, excess = costs.mean(), rectified_cost(costs, limit).mean()
        return {
            "repo/lam": self.lam,
            "repo/cost": mean.item(),
            "repo/safe_rate": is_safe(costs, limit).float().mean().item(),
            "repo/rectified_cost": excess.item(),
            "repo/compensation_gap": (excess - rectified_cost(mean, limit)).item(),
        }

    def _cost(self, info: Mapping[str, Any]) -> float:
        key = self.settings.cost_key
        if key not in info:
            names = ", ".join(map(str, info)) or "none"
            raise ValueError(f"the reward function must return a dict with score and {key!r} (cost_key); got: {names}")
        if not isinstance(value := info[key], (int, float, np.number)) or not np.isfinite(value):
            raise ValueError(f"the cost of a response, {key!r} (cost_key), must be a finite number; got {value!r}")
        return float(value)

    def advantages(self, rewards: Tensor, index: np.ndarray, scale_by_std: bool) -> Tensor:
        """Compute A_R - lambda A_C of reward and {C - d}^+ minus the means of their group, (B,).

        With lambda = 0 these are the advantages of verl's estimator `grpo`, but 0 in a group of one response. With
        another lambda they are those of `grpo` for the reward minus lambda {C - d}^+.

        Args:
            rewards: (B,) reward of each response, in the order of the costs.
            index: (B,) the prompt of each response (verl's uid).
            scale_by_std: divide by the standard deviation of R - lambda {C - d}^+ in the group (with n - 1) plus 1e-6.
        """
        if self.costs is None or self.costs.shape != rewards.shape:
            got = None if self.costs is None else tuple(self.costs.shape)
            raise ValueError(f"costs must have the shape of rewards, {tuple(rewards.shape)}; got {got}")
        costs = self.costs.to(rewards)
        group = torch.from_numpy(np.unique(index, return_inverse=True)[1]).to(rewards.device)
        counts = group.bincount().to(rewards.dtype)

        def centred(values: Tensor) -> Tensor:
            return values - (torch.zeros_like(counts).index_add(0, group, values) / counts)[group]

        limit = self.settings.cost_limit
        of_reward, of_cost = centred(rewards), centred(rectified_cost(costs, limit))
        combined = rectified_advantages(of_reward, of_cost, costs, self.lam, "rectified", limit)
        if not scale_by_std:
            return combined
        squares = torch.zeros_like(counts).index_add(0, group, combined**2)
        return combined / ((squares / (counts - 1).clamp_min(1)).sqrt()[group] + 1e-6)

    def finish(self) -> None:
        """Move lambda by the batch whose losses have used it."""
        if self.costs is None or self.counted is None:
            raise RuntimeError("finish needs a batch that began; call begin first")
        settings = self.settings
        excess = rectified_cost(self.costs[self.counted], settings.cost_limit).mean().item()
        self.lam = repo_lambda(self.lam, excess, settings.lam_lr, settings.lam_max)
        self.costs = self.counted = None

    def save(self, folder: str | Path) -> None:
        """Write lambda to a checkpoint's folder, which is made if it is missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / STATE).write_text(json.dumps({"lam": self.lam}))

    def load(self, folder: str | Path) -> None:
        """Read lambda from a checkpoint's folder. Raises FileNotFoundError if the trainer that wrote it kept none."""
        path = Path(folder) / STATE
        if not path.exists():
            raise FileNotFoundError(f"resuming needs {path}, where the trainer `repo` keeps lambda; it is missing")
        self.lam = json.loads(path.read_text())["lam"]
