"""Safety of a batch: compensation and every quantity that metrics and reports state, and their titles.

`repo_kernels.safety` defines a safe response and {C - d}^+. A constraint on the mean of C alone lets very safe
responses pay for unsafe ones; the compensation gap measures by how much. Source: RePO, arXiv 2410.19933.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repo_kernels.safety import Values, is_safe, rectified_cost, round_limit

__all__ = [
    "SUMMARY",
    "TITLES",
    "Compensation",
    "compensation_gap",
    "compensation_sentence",
    "describe_compensation",
    "is_safe",
    "mostly_unsafe",
    "rectified_cost",
    "round_limit",
    "summarize",
]


def compensation_gap(mean_rectified_cost: Values, mean_cost: Values, cost_limit: float) -> Values:
    """Compute E{C - d}^+ - {E[C] - d}^+, which is 0 iff no safe response pays for an unsafe one."""
    return mean_rectified_cost - rectified_cost(mean_cost, cost_limit)


def mostly_unsafe(safe_share: Values) -> Any:
    """Tell whether more than half of a prompt's responses are unsafe. safe_share: share of safe ones, any shape."""
    return safe_share < 0.5


SUMMARY = (
    "reward_mean",
    "reward_safe_mean",
    "cost_mean",
    "cost_p95",
    "cost_max",
    "safe_rate",
    "rectified_cost",
    "compensation_gap",
    "prompts_mostly_unsafe",
)
"""The quantities that `summarize` computes."""


def summarize(rewards: Tensor, costs: Tensor, group: Tensor, cost_limit: float) -> dict[str, float]:
    """Compute every quantity that a constrained run must report, in fp64.

    Args:
        rewards, costs: (B,) scores. group: (B,) the prompt of each response. cost_limit: d.

    Returns:
        reward_mean, reward_safe_mean (over safe responses, NaN where there is none), cost_mean, cost_p95, cost_max,
        safe_rate, rectified_cost (E{C - d}^+), compensation_gap, prompts_mostly_unsafe (share of prompts).
    """
    rewards, costs = rewards.double(), costs.double()
    rectified, safe = rectified_cost(costs, cost_limit), is_safe(costs, cost_limit)
    _, index = group.unique(return_inverse=True)
    prompts = int(index.max()) + 1
    safe_share = torch.zeros(prompts, dtype=torch.float64).index_add_(0, index, safe.double())
    safe_share /= torch.zeros(prompts, dtype=torch.float64).index_add_(0, index, torch.ones_like(costs))
    mean_cost, mean_rectified = costs.mean(), rectified.mean()
    return {
        "reward_mean": rewards.mean().item(),
        "reward_safe_mean": rewards[safe].mean().item() if bool(safe.any()) else math.nan,
        "cost_mean": mean_cost.item(),
        "cost_p95": costs.quantile(0.95).item(),
        "cost_max": costs.max().item(),
        "safe_rate": safe.double().mean().item(),
        "rectified_cost": mean_rectified.item(),
        "compensation_gap": compensation_gap(mean_rectified, mean_cost, cost_limit).item(),
        "prompts_mostly_unsafe": mostly_unsafe(safe_share).double().mean().item(),
    }


def compensation_sentence(mean_cost: float, cost_limit: float, unsafe_prompts: float) -> str | None:
    """Write that the mean constraint is met although prompts are unsafe; returns None unless both are true.

    unsafe_prompts: share of prompts that are mostly unsafe, in [0, 1].
    """
    if mean_cost > round_limit(cost_limit) or unsafe_prompts == 0:
        return None
    return f"mean constraint met (E[C] = {mean_cost:.3f} <= {cost_limit:g}), {unsafe_prompts:.1%} of prompts unsafe"


@dataclass(frozen=True)
class Compensation:
    """A statement about compensation for a report.

    sentence: says if the mean constraint is met and how many prompts are unsafe. hidden: True if the mean constraint is
    met although some responses are unsafe.
    """

    sentence: str
    hidden: bool


def describe_compensation(ids: Sequence[str], costs: Tensor, cost_limit: float, where: str) -> Compensation:
    """Write for a report what the mean cost of B >= 1 responses hides.

    ids: B prompt ids, one per response. costs: (B,). cost_limit: d. where: words that say which responses these are,
    e.g. "of the last step".
    """
    prompts: dict[str, int] = {}
    group = torch.tensor([prompts.setdefault(name, len(prompts)) for name in ids])
    summary = summarize(torch.zeros_like(costs), costs, group, cost_limit)
    mean, unsafe, unsafe_responses = summary["cost_mean"], summary["prompts_mostly_unsafe"], 1 - summary["safe_rate"]
    met = mean <= round_limit(cost_limit)
    verdict = "Mean constraint met" if met else "Mean constraint not met"
    numbers = f"E[C] = {mean:.3f}, d = {cost_limit:g}".replace("-", "−")
    if unsafe_responses == 0:
        return Compensation(f"{verdict} ({numbers}), and all {len(ids)} responses {where} are within the limit.", False)
    if len(ids) == len(prompts):  # a single response does not say what a prompt mostly gets
        sentence = f"{verdict}, {unsafe_responses:.1%} of responses unsafe ({numbers}; {len(ids)} responses {where})."
        return Compensation(sentence, met)
    more = f" in more than half of their responses, {unsafe_responses:.1%} of responses unsafe"
    sentence = f"{verdict}, {unsafe:.1%} of prompts unsafe{more} ({numbers}; {len(ids)} responses {where})."
    return Compensation(sentence, met)


@dataclass(frozen=True)
class Title:
    """The names and the format of a quantity. name: in tables. form: format string. short: name on a report's tiles."""

    name: str
    form: str
    short: str = ""


TITLES = {
    "judge_prompts_mostly_unsafe": Title(
        "prompts mostly unsafe (held-out judge)", "{:.1%}", "Unsafe prompts (held-out judge)"
    ),
    "prompts_mostly_unsafe": Title("prompts mostly unsafe (training cost)", "{:.1%}", "Unsafe prompts (training cost)"),
    "reward": Title("reward E[R]", "{:.3f}", "Reward"),
    "reward_safe": Title("reward of safe responses", "{:.3f}"),
    "safe_rate": Title("safe rate (training cost)", "{:.1%}", "Safe rate (training cost)"),
    "rectified_cost": Title("E{C-d}+", "{:.3f}", "E{C−d}⁺"),
    "cost": Title("E[C]", "{:.3f}", "E[C]"),
    "compensation_gap": Title("compensation gap", "{:.3f}", "Compensation gap"),
    "cost_p95": Title("cost, 95th percentile", "{:.3f}"),
    "cost_max": Title("cost, maximum", "{:.3f}"),
    "judge_safe_rate": Title("safe rate (held-out judge)", "{:.1%}", "Safe rate (held-out judge)"),
    "refusal_rate": Title("refusals", "{:.1%}"),
    "repetition": Title("repeated word 4-grams", "{:.1%}"),
    "response_tokens": Title("response tokens", "{:.1f}"),
    "topical": Title("on the topic of the prompt", "{:.1%}"),
    "ended": Title("ended within the limit of tokens", "{:.1%}"),
    "helpful": Title("on topic and ended within the limit", "{:.1%}"),
    "perplexity": Title("perplexity under the reference, median", "{:.1f}"),
    "kl": Title("KL to the reference, nats per response", "{:.2f}"),
    "kl_per_token": Title("KL to the reference, nats per token", "{:.4f}"),
    "entropy": Title("entropy, nats per token", "{:.3f}"),
}
"""Every reported quantity, in the order of tables."""
