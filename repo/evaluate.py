"""Evaluation on held-out prompts: training scorers and the held-out judge, with bootstrap intervals over prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .advantages import is_safe, rectified_cost
from .config import Config
from .data import Prompt
from .metrics import summarize
from .policy import Policy
from .rollout import sample
from .run import Run
from .scoring import Scorers
from .seeds import seed_from
from .setup import Parts
from .world import ALONE, World

RESAMPLES = 2000


class JudgeLike(Protocol):
    """Called with prompts and responses; `safe` of the verdict is a (B,) bool tensor."""

    def __call__(self, prompts: list[str], responses: list[str]) -> Any: ...


@dataclass(frozen=True)
class Evaluation:
    """Scored responses to held-out prompts, as records that a file keeps: `id category prompt response tokens reward
    cost` and, with a judge, `judge_safe`."""

    records: list[dict[str, Any]]
    cost_limit: float

    def column(self, key: str) -> Tensor:
        """(B,) fp64 of a numeric key."""
        return torch.tensor([float(r[key]) for r in self.records], dtype=torch.float64)

    @property
    def group(self) -> Tensor:
        """(B,) int64, the prompt of each response."""
        index: dict[str, int] = {}
        return torch.tensor([index.setdefault(r["id"], len(index)) for r in self.records])

    @property
    def per_response(self) -> dict[str, Tensor]:
        """The quantities that are averaged, (B,) fp64 each."""
        costs = self.column("cost")
        values = {
            "reward": self.column("reward"),
            "cost": costs,
            "safe_rate": is_safe(costs, self.cost_limit).double(),
            "rectified_cost": rectified_cost(costs, self.cost_limit),
            "response_tokens": self.column("tokens"),
        }
        if self.records and "judge_safe" in self.records[0]:
            values["judge_safe_rate"] = self.column("judge_safe")
        return values

    def summary(self) -> dict[str, Any]:
        """Means with 95 % intervals, and the other quantities of summarize()."""
        group = self.group
        means = {k: interval(v, group) for k, v in self.per_response.items()}
        return {"means": means, **summarize(self.column("reward"), self.column("cost"), group, self.cost_limit)}


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
    config: Config,
    policy: Policy,
    prompts: list[Prompt],
    scorers: Scorers,
    judge: JudgeLike | None,
    progress: Callable[[str], None] = lambda _: None,
    world: World = ALONE,
) -> Evaluation:
    """Sample, score and judge. The same seed gives the same random numbers to every policy, which pairs evaluations.

    Processes share the prompts, and all get the whole.
    """
    part = world.slice(len(prompts))
    found = _evaluate(config, policy, prompts, part, scorers, judge, progress) if part else []
    records = [record for records in world.gather(found) for record in records]
    return Evaluation(records, config.algorithm.cost_limit)


def _evaluate(
    config: Config,
    policy: Policy,
    prompts: list[Prompt],
    part: range,
    scorers: Scorers,
    judge: JudgeLike | None,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    progress("sampling")
    samples = config.evaluation.samples_per_prompt
    rollout = sample(policy, prompts, samples, config.rollout, config.seed, "evaluation", part)
    texts = list(rollout.texts)
    progress("scoring")
    scores = scorers(rollout.prompts, texts)
    progress("judging")
    safe = [] if judge is None else judge([p.text for p in rollout.prompts], texts).safe.tolist()
    verdicts: list[dict[str, bool]] = [{"judge_safe": verdict} for verdict in safe] or [{} for _ in texts]
    columns = texts, rollout.sequences.response_lengths.tolist(), scores.rewards.tolist(), scores.costs.tolist()
    keys = "id", "category", "prompt", "response", "tokens", "reward", "cost"
    return [
        dict(zip(keys, (p.id, p.category, p.text, *values), strict=True)) | verdict
        for p, *values, verdict in zip(rollout.prompts, *columns, verdicts, strict=True)
    ]


def evaluated(
    config: Config, parts: Parts, folder: Run, name: str, console: Console, policy: Policy, world: World
) -> Evaluation | None:
    """`evaluate` into RUN/eval/<name>.json, or what a resumed run has there; None without held-out prompts."""
    if not parts.eval_prompts:
        return None
    a, e, started = config.algorithm, config.evaluation, time.perf_counter()
    known = folder.read_evaluation(name)
    if known and [r["id"] for r in known["responses"]][:: e.samples_per_prompt] == [p.id for p in parts.eval_prompts]:
        return Evaluation(known["responses"], a.cost_limit)
    with console.status("") as status:
        found = evaluate(
            config,
            policy,
            parts.eval_prompts,
            parts.scorers,
            parts.judge,
            lambda stage: status.update(f"evaluation {name} training: {stage}"),
            world,
        )
    seconds = time.perf_counter() - started
    console.print(f"evaluation {name} training: {len(found.records)} responses in {seconds:.0f} s", highlight=False)
    folder.write_evaluation(name, {"summary": found.summary(), "responses": found.records})
    return found


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
    prompts = len(before.group.unique())
    table = Table(title=f"{prompts} held-out prompts, before and after (95 % bootstrap intervals over prompts)")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, before_text, after_text, change in comparison_rows(before, after):
        table.add_row(name, before_text, after_text, change)
    console.print(table)


def comparison_rows(before: Evaluation, after: Evaluation) -> list[tuple[str, str, str, str]]:
    """(name, before, after, paired change) as text."""
    rows = []
    group = before.group
    for key, title, form in ROWS:
        if key in before.per_response and key in after.per_response:
            a, b = before.per_response[key], after.per_response[key]
            change = _show(interval(b - a, group), form.replace("{:", "{:+"))
            rows.append((title, _show(interval(a, group), form), _show(interval(b, group), form), change))
    return rows


def _show(value: Mapping[str, float], form: str) -> str:
    mean, low, high = (form.format(value[k]) for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
