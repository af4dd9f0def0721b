"""What training changed in each of several runs, and in the mean over their seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repo.common.errors import UserError
from repo.evaluation.kinds import of_kind
from repo.evaluation.statistics import QUANTITIES, SEVERAL, Evaluation, interval_of

from .over_seeds import Interval, Seeds, change_of_seeds, of_seeds, ratio_of_seeds, within
from .runs import Usage

Pairs = Sequence[tuple[Evaluation, Evaluation]]
Form = Callable[[Pairs, str], Seeds]
WHOLE = "all prompts"


def before_of_seeds(pairs: Pairs, key: str) -> Seeds:
    """Compute a quantity before training."""
    return of_seeds([before for before, _ in pairs], key)


def after_of_seeds(pairs: Pairs, key: str) -> Seeds:
    """Compute a quantity after training."""
    return of_seeds([after for _, after in pairs], key)


@dataclass(frozen=True)
class Measure:
    """A number of each run. key: of QUANTITIES. kind: of prompts, or WHOLE. form: computes it from both evaluations."""

    key: str
    kind: str
    form: Form


_CHANGED = (
    ("judge_safe_rate", WHOLE),
    ("safe_rate", WHOLE),
    ("judge_prompts_mostly_unsafe", WHOLE),
    ("prompts_mostly_unsafe", WHOLE),
    ("judge_safe_rate", "harmful"),
    ("judge_safe_rate", "benign"),
    ("helpful", "benign"),
    ("topical", "benign"),
    ("ended", "benign"),
    ("reward", WHOLE),
)
MEASURES = {
    "kl": Measure("kl", WHOLE, after_of_seeds),
    "perplexity_ratio": Measure("perplexity", WHOLE, ratio_of_seeds),
}
"""By name every number that is told of each run; before, after and change of a quantity share the start of their names.
"""
for _key, _kind in _CHANGED:
    _name = _key if _kind == WHOLE else f"{_kind}_{_key}"
    MEASURES[f"{_name}_before"] = Measure(_key, _kind, before_of_seeds)
    MEASURES[f"{_name}_after"] = Measure(_key, _kind, after_of_seeds)
    MEASURES[f"{_name}_change"] = Measure(_key, _kind, change_of_seeds)


@dataclass(frozen=True)
class SeedRun:
    """A finished run. before, after: evaluations around its training. usage: what it took, None if not known."""

    seed: int
    before: Evaluation
    after: Evaluation
    usage: Usage | None


def measure(runs: Sequence[SeedRun]) -> dict[str, Seeds]:
    """Compute every measure that the evaluations of all runs allow."""
    found = {}
    for name, one in MEASURES.items():
        pairs = [(part_of(run.before, one.kind), part_of(run.after, one.kind)) for run in runs]
        if all(_has(side, one.key) for pair in pairs for side in pair):
            found[name] = one.form(pairs, one.key)
    return found


def part_of(evaluation: Evaluation, kind: str) -> Evaluation:
    """Return the responses to the prompts of a kind, or all of them."""
    return evaluation if kind == WHOLE else of_kind(evaluation, kind)


def _has(evaluation: Evaluation, key: str) -> bool:
    """Tell whether a quantity can be computed: this version knows it, and the evaluation has what it needs."""
    return key in QUANTITIES and evaluation.has(key) and (key not in SEVERAL or evaluation.samples > 1)


def summary(runs: Sequence[SeedRun]) -> dict[str, Any]:
    """Summarise finished runs.

    Returns:
        {"seeds": of each run {"seed", "minutes", "bytes", measure: interval over prompts}, "mean": {measure: interval
        over seeds and prompts}}.

    Raises:
        UserError: if the runs were evaluated on different prompts.
    """
    if len({tuple(side.ids) for run in runs for side in (run.before, run.after)}) > 1:
        raise UserError("--out: its runs were evaluated on different prompts; choose another folder")
    found = measure(runs)
    return {
        "seeds": [_of_run(run, index, found) for index, run in enumerate(runs)],
        "mean": {name: _mean(MEASURES[name], seeds) for name, seeds in found.items()},
    }


def _mean(measure: Measure, seeds: Seeds) -> Interval:
    """Return the mean over seeds; the interval of a share stays in [0, 1], which that of a change may leave."""
    return within(measure.key, seeds.interval) if measure.form in (before_of_seeds, after_of_seeds) else seeds.interval


def _of_run(run: SeedRun, index: int, found: Mapping[str, Seeds]) -> dict[str, Any]:
    """Return the measures of one run, whose seed is the `index`-th."""
    used = {"minutes": run.usage.minutes, "bytes": run.usage.bytes} if run.usage else {"minutes": None, "bytes": None}
    intervals = {n: interval_of(float(s.values[index]), s.resampled[index]) for n, s in found.items()}
    return {"seed": run.seed, **used, **intervals}
