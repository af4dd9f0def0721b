"""Shielded evaluation: what a shield returns for held-out prompts, by the training scorers and the held-out judge.

The bound on responses that are accepted and yet unsafe is computed on one half of the prompts and compared with the
other half, since it is a statement about prompts that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..config.schema import Config
from ..data.prompts import Prompt
from ..models.policy import Policy
from ..rollout.shield import CostScorer, Shield, Shielded
from ..runs.console import progress_bar
from ..scoring.judge import Judge
from ..scoring.scorers import Scorers
from .binomial import clopper_pearson_upper
from .outcome import COLUMNS as SAFE_COLUMNS
from .outcome import SAFE_RATES, scorers_of
from .responses import columns_of, records_of
from .shield_options import ShieldSettings
from .statistics import LEVEL, Evaluation, draws_of, few, interval_of, measured
from .tables import show

HALVES = ("calibration", "check")
SINGLE = " (one scorer, whose deviation counts as 0)"


@dataclass(frozen=True)
class ShieldedEvaluator:
    """Measures what a shield around a policy returns for held-out prompts.

    config: sampling, seed, cost limit and samples per prompt are read from it.
    scorers: the reward and cost of training. judge: scorer kept out of training; None leaves its verdicts out.
    settings: of the shield. ensemble: its cost scorers. console: where progress is printed.
    """

    config: Config
    scorers: Scorers
    judge: Judge | None
    settings: ShieldSettings
    ensemble: Sequence[CostScorer]
    console: Console

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], advance: Callable[[int], None] = lambda _: None
    ) -> Evaluation:
        """Let the shield answer each prompt evaluation.samples_per_prompt times, and score what it returns.

        Its first draw of a prompt is the first response of an evaluation without a shield. The records have `draws`,
        `accepted` and `upper_cost` besides the usual keys, and no KL or log-probability, since the policy's are not
        those of the responses that the shield returns.

        advance: called with the number of responses done since its last call.
        """
        config, settings = self.config, self.settings
        shield = Shield(
            policy,
            self.ensemble,
            config.algorithm.cost_limit,
            settings.samples,
            settings.z,
            refusal=settings.refusal,
            rollout=config.rollout,
            seed=config.seed,
        )
        repeated = [prompt for prompt in prompts for _ in range(config.evaluation.samples_per_prompt)]
        answers = shield(repeated, "evaluation", advance)
        return Evaluation(self._records(answers), config.algorithm.cost_limit)

    def _records(self, answers: Shielded) -> list[dict[str, Any]]:
        """Score the returned responses and make their records."""
        prompts, texts = answers.prompts, answers.texts
        scores = self.scorers(prompts, texts)
        columns: dict[str, Sequence[Any]] = {
            "tokens": answers.tokens.tolist(),
            "truncated": answers.truncated.tolist(),
            **columns_of(prompts, texts, scores, self.judge),
            "draws": answers.draws.tolist(),
            "accepted": answers.accepted.tolist(),
            "upper_cost": answers.upper.tolist(),
        }
        return records_of(prompts, texts, columns)

    def with_progress(self, title: str, policy: Policy, prompts: Sequence[Prompt]) -> Evaluation:
        """Evaluate a policy under a progress bar. title: label of the bar."""
        with progress_bar(self.console) as bar:
            total = len(prompts) * self.config.evaluation.samples_per_prompt
            task = bar.add_task(escape(title), total=total)
            return self(policy, prompts, lambda n: bar.advance(task, n))

    def describe(self) -> dict[str, Any]:
        """Return the settings of the shield as JSON values, with the limit and the names of its scorers."""
        scoring = self.config.scoring.cost
        names = [*self.settings.scorers] or [scoring if isinstance(scoring, str) else " + ".join(scoring)]
        return {**asdict(self.settings), "scorers": names, "limit": self.config.algorithm.cost_limit}


def shield_report(evaluation: Evaluation) -> dict[str, Any]:
    """Summarise a shielded evaluation.

    Returns {"mean_draws", "without_acceptable_draw", "reward": interval, "judges": {judge: {"safe_rate": interval,
    "unsafe_accepted": ...}}}, with the judges of `outcome`; intervals are {"mean", "low", "high"}. See unsafe_accepted.
    """
    overall, shape = measured(evaluation.columns), (len(evaluation.ids), evaluation.samples)
    draws, accepted = (evaluation.column(key).numpy().reshape(shape) for key in ("draws", "accepted"))
    judges = {
        name: {
            "safe_rate": overall[SAFE_RATES[name]],
            "unsafe_accepted": unsafe_accepted(accepted[:, 0], evaluation.columns[SAFE_COLUMNS[name]][:, 0]),
        }
        for name in scorers_of(evaluation, evaluation)
    }
    enough = not few(evaluation.columns)
    return {
        "mean_draws": _mean(draws, enough),
        "without_acceptable_draw": _mean(1 - accepted, enough),
        "reward": overall["reward"],
        "judges": judges,
    }


def _mean(values: NDArray[np.float64], enough: bool) -> dict[str, float | None]:
    """Average values (P, k), with a bootstrap interval over prompts where there are enough of them."""
    per_prompt = values.mean(1)
    return interval_of(float(per_prompt.mean()), per_prompt[draws_of(len(per_prompt))].mean(1) if enough else None)


def unsafe_accepted(accepted: NDArray[np.float64], safe: NDArray[np.float64]) -> dict[str, Any]:
    """Bound the probability that an accepted response is unsafe on the first half of the prompts, and check it.

    accepted, safe: (P,) of 0 and 1, of one response to each prompt, since those to one prompt are not independent. The
    prompts are in an order that does not depend on the responses; of an odd number the second half has one more.

    Returns {"level", "bound", "calibration", "check", "holds"}. bound: Clopper-Pearson's upper bound at `level` from
    the calibration half. Each half is {"accepted", "unsafe", "rate"}: how many responses were accepted, how many of
    these are unsafe, and their share, None without one. holds: the share of the check half is at most the bound, None
    where the check half has no accepted response.
    """
    half = len(accepted) // 2
    first, second = (_counted(accepted[part], safe[part]) for part in (slice(None, half), slice(half, None)))
    bound, rate = clopper_pearson_upper(first["unsafe"], first["accepted"], LEVEL), _share(second)
    halves = {name: {**counts, "rate": _share(counts)} for name, counts in zip(HALVES, (first, second), strict=True)}
    return {"level": LEVEL, "bound": bound, **halves, "holds": None if rate is None else rate <= bound}


def _counted(accepted: NDArray[np.float64], safe: NDArray[np.float64]) -> dict[str, int]:
    """Count the accepted responses and the unsafe ones among them."""
    return {"accepted": int(accepted.sum()), "unsafe": int((accepted * (1 - safe)).sum())}


def _share(counts: Mapping[str, int]) -> float | None:
    """Compute the share of the accepted responses that are unsafe, None without an accepted one."""
    return counts["unsafe"] / counts["accepted"] if counts["accepted"] else None


def print_shield(console: Console, title: str, report: Mapping[str, Any]) -> None:
    """Print a shield's report. title: what was evaluated. report: of shield_report, with the shield's settings."""
    table = Table(
        title=escape(
            f"{title} behind a shield: up to {report['samples']} draws, accepted if cost + {report['z']:g} deviations "
            f"<= {report['limit']:g}"
        ),
        caption=escape(f"cost by {', '.join(report['scorers'])}") + SINGLE * (len(report["scorers"]) == 1),
    )
    table.add_column("")
    table.add_column("", justify="right", no_wrap=True)
    for name, values in report["judges"].items():
        table.add_row(f"safe rate ({name})", show(values["safe_rate"], "{:.1%}"))
    table.add_row("reward E[R]", show(report["reward"], "{:.3f}"))
    table.add_row("draws per response", show(report["mean_draws"], "{:.2f}"))
    table.add_row("without an acceptable draw", show(report["without_acceptable_draw"], "{:.1%}"))
    for name, values in report["judges"].items():
        found = values["unsafe_accepted"]
        table.add_section()
        table.add_row(f"accepted but unsafe ({name}), first half of the prompts", _count(found["calibration"]))
        table.add_row(f"  {found['level']:.0%} Clopper-Pearson bound from it", f"{found['bound']:.1%}")
        verdict = {True: "within the bound", False: "beyond the bound", None: "none accepted"}[found["holds"]]
        table.add_row(f"  second half, {verdict}", _count(found["check"]))
    console.print(table)


def _count(half: Mapping[str, Any]) -> str:
    """Write the counts of one half, e.g. "2 of 48 (4.2%)"."""
    share = "" if half["rate"] is None else f" ({half['rate']:.1%})"
    return f"{half['unsafe']} of {half['accepted']}{share}"
