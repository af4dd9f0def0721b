"""Evaluation on held-out prompts: training scorers and the held-out judge, with bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .advantages import rectified_cost
from .config import RolloutConfig
from .data import Prompt
from .metrics import summarize
from .policy import Policy
from .rollout import Rollout, sample
from .scoring import Scorers
from .seeds import seed_from

RESAMPLES = 2000


class JudgeLike(Protocol):
    """Called with prompts and responses; `safe` of the verdict is a (B,) bool tensor."""

    def __call__(self, prompts: list[str], responses: list[str]) -> Any: ...


@dataclass(frozen=True)
class Evaluation:
    """Held-out responses and their verdicts; all tensors (B,). judge_safe is None without a judge."""

    rollout: Rollout
    rewards: Tensor
    costs: Tensor
    judge_safe: Tensor | None
    cost_limit: float

    @property
    def per_response(self) -> dict[str, Tensor]:
        """The quantities that are averaged, (B,) fp64 each."""
        values = {
            "reward": self.rewards.double(),
            "cost": self.costs.double(),
            "safe_rate": (self.costs <= self.cost_limit).double(),
            "rectified_cost": rectified_cost(self.costs.double(), self.cost_limit),
            "response_tokens": self.rollout.sequences.response_lengths.double(),
        }
        if self.judge_safe is not None:
            values["judge_safe_rate"] = self.judge_safe.double()
        return values

    def summary(self) -> dict[str, Any]:
        """Means with 95 % intervals, and the other quantities of summarize()."""
        means = {k: interval(v, self.rollout.group) for k, v in self.per_response.items()}
        return {"means": means, **summarize(self.rewards, self.costs, self.rollout.group, self.cost_limit)}

    def records(self) -> list[dict[str, Any]]:
        """One JSON record per response."""
        rows = []
        for i, (prompt, text) in enumerate(zip(self.rollout.prompts, self.rollout.texts, strict=True)):
            row: dict[str, Any] = {
                "id": prompt.id,
                "category": prompt.category,
                "prompt": prompt.text,
                "response": text,
            }
            row |= {"reward": self.rewards[i].item(), "cost": self.costs[i].item()}
            if self.judge_safe is not None:
                row["judge_safe"] = bool(self.judge_safe[i])
            rows.append(row)
        return rows


def interval(values: Tensor, group: Tensor, level: float = 0.95) -> dict[str, float]:
    """Mean and percentile-bootstrap interval of the mean; prompts are resampled, with all their responses.

    values, group: (B,). Deterministic. Returns {"mean", "low", "high"}.
    """
    _, index = group.unique(return_inverse=True)
    prompts = int(index.max()) + 1
    sums = torch.zeros(prompts, dtype=torch.float64).index_add_(0, index, values.double()).numpy()
    counts = np.bincount(index.numpy(), minlength=prompts).astype(float)
    draws = np.random.default_rng(seed_from("bootstrap", prompts)).integers(0, prompts, (RESAMPLES, prompts))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {"mean": float(values.double().mean()), "low": float(low), "high": float(high)}


def evaluate(
    policy: Policy,
    prompts: list[Prompt],
    samples: int,
    config: RolloutConfig,
    scorers: Scorers,
    judge: JudgeLike | None,
    cost_limit: float,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Sample, score and judge. The same seed gives the same random numbers to every policy, which pairs evaluations."""
    progress("sampling")
    rollout = sample(policy, prompts, samples, config, seed, "evaluation")
    texts, questions = list(rollout.texts), [p.text for p in rollout.prompts]
    progress("scoring")
    scores = scorers(questions, texts)
    progress("judging")
    safe = None if judge is None else judge(questions, texts).safe
    return Evaluation(rollout, scores.rewards, scores.costs, safe, cost_limit)


ROWS = (
    ("reward", "reward", "{:.3f}"),
    ("safe_rate", "safe rate (training cost)", "{:.1%}"),
    ("rectified_cost", "E{C-d}+", "{:.3f}"),
    ("cost", "E[C]", "{:.3f}"),
    ("judge_safe_rate", "safe rate (held-out judge)", "{:.1%}"),
    ("response_tokens", "response tokens", "{:.1f}"),
)


def print_comparison(console: Console, before: Evaluation, after: Evaluation) -> None:
    """The closing lines of a run: each quantity before and after with intervals, and the paired change."""
    prompts = len(set(before.rollout.group.tolist()))
    table = Table(title=f"{prompts} held-out prompts, before and after (95 % bootstrap intervals over prompts)")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, before_text, after_text, change in comparison_rows(before, after):
        table.add_row(name, before_text, after_text, change)
    console.print(table)


def comparison_rows(before: Evaluation, after: Evaluation) -> list[tuple[str, str, str, str]]:
    """(name, before, after, paired change) as text."""
    rows = []
    group = before.rollout.group
    for key, title, form in ROWS:
        if key in before.per_response and key in after.per_response:
            a, b = before.per_response[key], after.per_response[key]
            change = _show(interval(b - a, group), form.replace("{:", "{:+"))
            rows.append((title, _show(interval(a, group), form), _show(interval(b, group), form), change))
    return rows


def _show(value: Mapping[str, float], form: str) -> str:
    mean, low, high = (form.format(value[k]) for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
