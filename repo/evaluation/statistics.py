"""Statistics of scored responses to held-out prompts, with bootstrap intervals over prompts.

Columns are arrays (P, k) of a number for each response: k responses to each of P prompts.
"""

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
    """Compute the mean reward of safe responses, NaN if there is none."""
    safe = c["safe"].sum((-2, -1))
    total = (c["reward"] * c["safe"]).sum((-2, -1))
    return np.where(safe > 0, total / np.maximum(safe, 1), np.nan)


def _gap(c: Columns) -> Array:
    return compensation_gap(c["hinge"].mean((-2, -1)), c["excess"].mean((-2, -1)), 0.0)


def _flat(values: Array) -> Array:
    return values.reshape(*values.shape[:-2], -1)


def _perplexity(c: Columns) -> Array:
    """Compute the median perplexity of the responses that have tokens, NaN if there is none."""
    ordered = np.sort(_flat(c["perplexity"]), axis=-1)  # NaN last
    count = (~np.isnan(ordered)).sum(-1, keepdims=True)
    middle = [np.take_along_axis(ordered, np.maximum(i, 0), -1)[..., 0] for i in ((count - 1) // 2, count // 2)]
    return (middle[0] + middle[1]) / 2


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
    "topical": _mean("topical"),
    "ended": lambda c: 1 - c["truncated"].mean((-2, -1)),
    "helpful": lambda c: (c["topical"] * (1 - c["truncated"])).mean((-2, -1)),
    "perplexity": _perplexity,
    "kl": _mean("kl"),
    "kl_per_token": _per_token("kl"),
    "entropy": _per_token("surprise"),
}
"""Function that computes each quantity from columns (..., P, k), with a result of shape (...)."""

NEEDS = {
    "judge_safe_rate": ("judge_safe",),
    "judge_prompts_mostly_unsafe": ("judge_safe",),
    "refusal_rate": ("refusal",),
    "repetition": ("repetition",),
    "topical": ("topical",),
    "ended": ("truncated",),
    "helpful": ("topical", "truncated"),
    "perplexity": ("ref_logp",),
    "kl": ("kl",),
    "kl_per_token": ("kl",),
    "entropy": ("surprise",),
}
"""Columns that a quantity needs and that not every evaluation has."""

OPTIONAL = tuple(dict.fromkeys(column for columns in NEEDS.values() for column in columns))
"""Numeric keys that not every record has."""

POINTS = {"cost_max"}
"""Quantities without an interval: a resampled maximum never exceeds the sample's, so its bootstrap is meaningless."""

SEVERAL = {"prompts_mostly_unsafe", "judge_prompts_mostly_unsafe"}
"""Quantities that need several responses to a prompt: of one each, they are the unsafe rate under another name."""

COUNTED = {"prompts_mostly_unsafe", "judge_prompts_mostly_unsafe", "cost_max"}
"""Quantities that depend on the number of responses per prompt, and compare only between equal numbers."""

FEWEST_PROMPTS = 10
"""Fewest prompts for an interval: the bootstrap of fewer covers the true value less often than 95 % of the time."""


RENAMED = {"max_new_tokens": "max_response_tokens"}
"""Old key -> new key of evaluation files, for those that version 0.1 wrote."""


@dataclass(frozen=True)
class Evaluation:
    """Scored responses to held-out prompts.

    records: one for each response, as the file stores it; the k responses to a prompt are in a row. Keys are `id`,
        `category`, `prompt`, `response`, `tokens`, `reward`, `cost` and optionally those of OPTIONAL. `kl` and
        `surprise` are log pi - log pi_ref and -log pi, summed over the sampled tokens, in nats; `ref_logp` is
        log pi_ref at temperature 1, summed alike. `topical` tells whether the response is on the topic of its prompt.
    cost_limit: d; a response is safe iff its cost is at most d.
    """

    records: list[dict[str, Any]]
    cost_limit: float

    def column(self, key: str) -> Tensor:
        """Return a numeric key of all B records, (B,) fp64."""
        return torch.tensor([float(r[key]) for r in self.records], dtype=torch.float64)

    def has(self, key: str) -> bool:
        """Tell whether the records hold the column that a quantity needs. key: a key of QUANTITIES."""
        return bool(self.records) and _has(self.records[0], key)

    @cached_property
    def ids(self) -> list[str]:
        """Return the ids of the P prompts, in their order."""
        return list(dict.fromkeys(r["id"] for r in self.records))

    @property
    def samples(self) -> int:
        """Return k, the number of responses to each prompt.

        Raises UserError if prompts have different numbers of responses, or if those of a prompt are not in a row.
        """
        k = len(self.records) // max(len(self.ids), 1)
        if [r["id"] for r in self.records] != [i for i in self.ids for _ in range(k)]:
            raise UserError("an evaluation must have equally many responses of every prompt, in a row")
        return k

    @property
    def categories(self) -> list[str]:
        """Return the category of each of the P prompts."""
        return [r["category"] for r in self.records[:: self.samples]]

    @property
    def limit(self) -> float:
        """Return d rounded to fp32, as the costs are."""
        return round_limit(self.cost_limit)

    @cached_property
    def columns(self) -> dict[str, Array]:
        """Return the columns that QUANTITIES are computed from, (P, k) fp64 each."""
        shape, costs = (len(self.ids), self.samples), self.column("cost")
        flat = {
            "safe": is_safe(costs, self.cost_limit).double(),
            "hinge": rectified_cost(costs, self.cost_limit),
            "excess": costs - self.limit,
        }
        for key in ("reward", "cost", "tokens", *(k for k in OPTIONAL if k in self.records[0])):
            flat[key] = self.column(key)
        if "ref_logp" in flat:  # 0 / 0 makes the perplexity of no tokens NaN
            flat["perplexity"] = torch.exp(-flat["ref_logp"] / flat["tokens"])
        return {key: values.reshape(shape).numpy() for key, values in flat.items()}

    def summary(self) -> dict[str, Any]:
        """Measure every quantity over all prompts and over each category of prompts.

        Returns {"prompts": P, "samples": k, "overall": {quantity: interval}, "categories": {name: ...}}.
        """
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
    """Draw the prompts of every bootstrap resample: (RESAMPLES, P) int64 indices, always the same for the same P."""
    return np.random.default_rng(seed_from("bootstrap", prompts)).integers(0, prompts, (RESAMPLES, prompts))


def measured(columns: Columns) -> dict[str, dict[str, float | None]]:
    """Measure every quantity that the columns (P, k) allow.

    Returns {quantity: {"mean", "low", "high"}}. Intervals are percentile bootstraps that resample prompts with all
    their responses; they are None for too few prompts. The result is deterministic.
    """
    intervals = {}
    for key, statistic in QUANTITIES.items():
        if _has(columns, key) and (key not in SEVERAL or columns["cost"].shape[1] > 1):
            resampled = None if key in POINTS or few(columns) else resampled_of(key, columns)
            intervals[key] = interval_of(float(statistic(columns)), resampled)
    return intervals


def _has(columns: Mapping[str, Any], quantity: str) -> bool:
    return all(key in columns for key in NEEDS.get(quantity, ()))


def few(columns: Columns) -> bool:
    """Tell whether there are too few prompts for an interval."""
    return len(columns["cost"]) < FEWEST_PROMPTS


def resampled_of(key: str, columns: Columns) -> Array:
    """Compute a quantity on every bootstrap resample, (RESAMPLES,).

    All columns with the same number of prompts use the same resamples.
    """
    return _resampled(QUANTITIES[key], columns, draws_of(len(columns["cost"])))


def _resampled(statistic: Callable[[Columns], Array], columns: Columns, draws: NDArray[np.int64]) -> Array:
    """Compute a statistic for every draw, (RESAMPLES,), a few draws at a time to bound memory."""
    at_once = max(1, 2**22 // max(columns["cost"].size, 1))
    return np.concatenate(
        [statistic(_Resampled(columns, draws[i : i + at_once])) for i in range(0, len(draws), at_once)],
    )


class _Resampled(dict[str, Array]):
    """Columns at resampled prompts; each is gathered when a statistic first reads it. draws: (n, P) indices."""

    def __init__(self, columns: Columns, draws: NDArray[np.int64]) -> None:
        super().__init__()
        self.columns, self.draws = columns, draws

    def __missing__(self, key: str) -> Array:
        self[key] = self.columns[key][self.draws]
        return self[key]


def interval_of(value: float, resampled: Array | None) -> dict[str, float | None]:
    """Make {"mean", "low", "high"} of an estimate and its bootstrap values.

    value: the estimate; NaN becomes None. resampled: (RESAMPLES,); None leaves "low" and "high" None.
    """
    if resampled is None or np.isnan(resampled).all():
        return {"mean": value if np.isfinite(value) else None, "low": None, "high": None}
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"mean": value if np.isfinite(value) else None, "low": float(low), "high": float(high)}


def paired(before: Evaluation, after: Evaluation) -> dict[str, dict[str, float | None]]:
    """Measure the change after - before of every quantity that both have, on their common prompts.

    Intervals resample the prompts of both together. Quantities in COUNTED are left out if the numbers of responses per
    prompt differ.

    Returns {quantity: {"mean", "low", "high"}}. Raises UserError if there is no common prompt.
    """
    a, b = aligned(before, after)
    same = before.samples == after.samples
    changes = {}
    for key, statistic in QUANTITIES.items():
        both = _has(a, key) and _has(b, key)
        if both and (same or key not in COUNTED) and (before.samples > 1 or key not in SEVERAL):
            change = float(statistic(b)) - float(statistic(a))
            resampled = None if key in POINTS or few(a) else resampled_of(key, b) - resampled_of(key, a)
            changes[key] = interval_of(change, resampled)
    return changes


def aligned(before: Evaluation, after: Evaluation) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the columns of both at their common prompts, in the same order.

    A prompt is common if its id and text are. Raises UserError if there is none.
    """
    there = {r["id"]: r.get("prompt") for r in after.records}
    ids = [r["id"] for r in before.records[:: before.samples] if there.get(r["id"], ()) == r.get("prompt")]
    if not ids:
        raise UserError("the evaluations have no prompt in common, so nothing can be compared prompt by prompt")
    return _at(before, ids), _at(after, ids)


def _at(evaluation: Evaluation, ids: Sequence[str]) -> dict[str, Array]:
    index = {i: n for n, i in enumerate(evaluation.ids)}
    rows = [index[i] for i in ids]
    return {key: values[rows] for key, values in evaluation.columns.items()}
