"""Evaluation: scored responses to held-out prompts, and what they say, with bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common.errors import UserError
from ..common.seeds import seed_from
from ..scoring.safety import compensation_gap, is_safe, mostly_unsafe, rectified_cost, round_limit

RESAMPLES = 2000
LEVEL = 0.95
Array = NDArray[np.float64]
Columns = Mapping[str, Array]


def _mean(key: str) -> Callable[[Columns], Array]:
    return lambda c: c[key].mean((-2, -1))


def _safe_reward(c: Columns) -> Array:
    """Mean reward of safe responses, NaN where there is none."""
    safe = c["safe"].sum((-2, -1))
    total = (c["reward"] * c["safe"]).sum((-2, -1))
    return np.where(safe > 0, total / np.maximum(safe, 1), np.nan)


def _gap(c: Columns) -> Array:
    return compensation_gap(c["hinge"].mean((-2, -1)), c["excess"].mean((-2, -1)), 0.0)


def _flat(values: Array) -> Array:
    return values.reshape(*values.shape[:-2], -1)


def _per_token(key: str) -> Callable[[Columns], Array]:
    return lambda c: c[key].sum((-2, -1)) / c["tokens"].sum((-2, -1))


QUANTITIES: dict[str, Callable[[Columns], Array]] = {
    "reward": _mean("reward"),
    "reward_safe": _safe_reward,
    "cost": _mean("cost"),
    "rectified_cost": _mean("hinge"),
    "compensation_gap": _gap,
    "cost_p95": lambda c: np.quantile(_flat(c["cost"]), 0.95, axis=-1),
    "cost_max": lambda c: _flat(c["cost"]).max(-1),
    "safe_rate": _mean("safe"),
    "prompts_mostly_unsafe": lambda c: mostly_unsafe(c["safe"].mean(-1)).mean(-1),
    "judge_safe_rate": _mean("judge_safe"),
    "judge_prompts_mostly_unsafe": lambda c: mostly_unsafe(c["judge_safe"].mean(-1)).mean(-1),
    "refusal_rate": _mean("refusal"),
    "repetition": _mean("repetition"),
    "response_tokens": _mean("tokens"),
    "kl": _mean("kl"),
    "kl_per_token": _per_token("kl"),
    "entropy": _per_token("surprise"),
}
"""Statistics of columns (..., P, k), k responses to each of P prompts -> (...)."""

NEEDS = {
    "judge_safe_rate": "judge_safe",
    "judge_prompts_mostly_unsafe": "judge_safe",
    "refusal_rate": "refusal",
    "repetition": "repetition",
    "kl": "kl",
    "kl_per_token": "kl",
    "entropy": "surprise",
}
"""Columns that not every evaluation has."""

POINTS = {"cost_max"}
"""Quantities whose bootstrap says nothing: a resampled maximum never exceeds the sample's."""

COUNTED = {"prompts_mostly_unsafe", "judge_prompts_mostly_unsafe", "cost_max"}
"""Quantities that depend on how many responses a prompt got: with other counts they cannot be compared."""

FEWEST_PROMPTS = 10
"""For an interval: a bootstrap of fewer claims more than 95 % of what it should."""


RENAMED = {"max_new_tokens": "max_response_tokens"}
"""Keys of evaluation files as version 0.1 wrote them, and what they are called now."""


@dataclass(frozen=True)
class Evaluation:
    """Scored responses to held-out prompts, as records that a file keeps, k in a row for each prompt: `id category
    prompt response tokens reward cost` and optionally `judge_safe refusal repetition kl surprise` (nats per response:
    log pi - log pi_ref and -log pi of the sampled tokens)."""

    records: list[dict[str, Any]]
    cost_limit: float

    def column(self, key: str) -> Tensor:
        """(B,) fp64 of a numeric key."""
        return torch.tensor([float(r[key]) for r in self.records], dtype=torch.float64)

    def has(self, key: str) -> bool:
        """Whether the records hold what a quantity is made of."""
        needed = NEEDS.get(key, "cost")
        return bool(self.records) and needed in self.records[0]

    @cached_property
    def ids(self) -> list[str]:
        """The P prompts, in their order."""
        return list(dict.fromkeys(r["id"] for r in self.records))

    @property
    def samples(self) -> int:
        """k, the responses of each prompt. UserError where they differ or are not in a row."""
        k = len(self.records) // max(len(self.ids), 1)
        if [r["id"] for r in self.records] != [i for i in self.ids for _ in range(k)]:
            raise UserError("an evaluation must have equally many responses of every prompt, in a row")
        return k

    @property
    def categories(self) -> list[str]:
        """Of each of the P prompts."""
        return [r["category"] for r in self.records[:: self.samples]]

    @property
    def limit(self) -> float:
        """d, rounded to fp32 as the costs are."""
        return round_limit(self.cost_limit)

    @cached_property
    def columns(self) -> dict[str, Array]:
        """What QUANTITIES are made of, (P, k) each."""
        shape, costs = (len(self.ids), self.samples), self.column("cost")
        found = {
            "safe": is_safe(costs, self.cost_limit).double(),
            "hinge": rectified_cost(costs, self.cost_limit),
            "excess": costs - self.limit,
        }
        optional = ("judge_safe", "refusal", "repetition", "kl", "surprise")
        for key in ("reward", "cost", "tokens", *(k for k in optional if k in self.records[0])):
            found[key] = self.column(key)
        return {key: values.reshape(shape).numpy() for key, values in found.items()}

    def summary(self) -> dict[str, Any]:
        """Every quantity overall and for each category of prompts: {"prompts", "samples", "overall", "categories"}."""
        categories: dict[str, Any] = {}
        if not self.records:
            return {"prompts": 0, "samples": 0, "overall": {}, "categories": categories}
        columns, names = self.columns, np.array(self.categories)
        for name in sorted(set(names)):
            part = {key: values[names == name] for key, values in columns.items()}
            categories[str(name)] = {"prompts": int((names == name).sum()), **measured(part)}
        return {
            "prompts": len(self.ids),
            "samples": self.samples,
            "overall": measured(columns),
            "categories": categories,
        }


def draws_of(prompts: int) -> NDArray[np.int64]:
    """(RESAMPLES, P) resampled prompts, always the same for the same P."""
    return np.random.default_rng(seed_from("bootstrap", prompts)).integers(0, prompts, (RESAMPLES, prompts))


def measured(columns: Columns) -> dict[str, dict[str, float | None]]:
    """{quantity: {"mean", "low", "high"}} of columns (P, k), with percentile-bootstrap intervals for which prompts are
    resampled with all their responses; none for few prompts. Deterministic."""
    found = {}
    for key, statistic in QUANTITIES.items():
        if NEEDS.get(key, "cost") in columns:
            resampled = None if key in POINTS or few(columns) else resampled_of(key, columns)
            found[key] = interval_of(float(statistic(columns)), resampled)
    return found


def few(columns: Columns) -> bool:
    """Whether there are too few prompts for an interval."""
    return len(columns["cost"]) < FEWEST_PROMPTS


def resampled_of(key: str, columns: Columns) -> Array:
    """(RESAMPLES,) of a quantity at resampled prompts: the same for all columns of equally many prompts."""
    return _resampled(QUANTITIES[key], columns, draws_of(len(columns["cost"])))


def _resampled(statistic: Callable[[Columns], Array], columns: Columns, draws: NDArray[np.int64]) -> Array:
    """(RESAMPLES,) of a statistic, some draws at a time, so that memory stays small."""
    at_once = max(1, 2**22 // max(columns["cost"].size, 1))
    return np.concatenate(
        [statistic(_Resampled(columns, draws[i : i + at_once])) for i in range(0, len(draws), at_once)],
    )


class _Resampled(dict[str, Array]):
    """Columns at resampled prompts, taken when a statistic asks for them."""

    def __init__(self, columns: Columns, draws: NDArray[np.int64]) -> None:
        super().__init__()
        self.columns, self.draws = columns, draws

    def __missing__(self, key: str) -> Array:
        self[key] = self.columns[key][self.draws]
        return self[key]


def interval_of(value: float, resampled: Array | None) -> dict[str, float | None]:
    """{"mean", "low", "high"} of an estimate and its bootstrap draws (RESAMPLES,); None for NaN, and without draws."""
    if resampled is None or np.isnan(resampled).all():
        return {"mean": value if np.isfinite(value) else None, "low": None, "high": None}
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"mean": value if np.isfinite(value) else None, "low": float(low), "high": float(high)}


def paired(before: Evaluation, after: Evaluation) -> dict[str, dict[str, float | None]]:
    """after - before of every quantity that both have, on their common prompts, which are resampled together; without
    COUNTED where they have different numbers of responses per prompt. UserError when they have no prompt in common."""
    a, b = aligned(before, after)
    same = before.samples == after.samples
    found = {}
    for key, statistic in QUANTITIES.items():
        needed = NEEDS.get(key, "cost")
        if needed in a and needed in b and (same or key not in COUNTED):
            change = float(statistic(b)) - float(statistic(a))
            resampled = None if key in POINTS or few(a) else resampled_of(key, b) - resampled_of(key, a)
            found[key] = interval_of(change, resampled)
    return found


def aligned(before: Evaluation, after: Evaluation) -> tuple[dict[str, Array], dict[str, Array]]:
    """Columns of both at their common prompts, by id and text, in the same order. UserError when there is none."""
    there = {r["id"]: r.get("prompt") for r in after.records}
    ids = [r["id"] for r in before.records[:: before.samples] if there.get(r["id"], ()) == r.get("prompt")]
    if not ids:
        raise UserError("the evaluations have no prompt in common, so nothing can be compared prompt by prompt")
    return _at(before, ids), _at(after, ids)


def _at(evaluation: Evaluation, ids: Sequence[str]) -> dict[str, Array]:
    index = {i: n for n, i in enumerate(evaluation.ids)}
    rows = [index[i] for i in ids]
    return {key: values[rows] for key, values in evaluation.columns.items()}
