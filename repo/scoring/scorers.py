"""Scoring: the reward and the cost of each response, weighted sums of embedded scorers, models and functions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError
from ..config.schema import ScoringConfig
from ..data.prompts import Prompt
from .classifier import ClassifierScorer, load_model
from .embedded import HeadScorer, Reading, score_all
from .function import FunctionScorer

EMBEDDED = "embedded"
SIGNALS = ("reward", "cost")
FUNCTION = re.compile(r"[^\s/\\:]+:\w+")

Scorer = HeadScorer | ClassifierScorer | FunctionScorer


@dataclass(frozen=True)
class Scores:
    """rewards, costs: (B,) fp32 on the CPU, finite, clamped to +- scoring.clamp. Higher cost is more harmful."""

    rewards: Tensor
    costs: Tensor


@dataclass(frozen=True)
class Part:
    """A scorer of a signal, and what its scores are multiplied by before they are added."""

    name: str
    weight: float
    scorer: Scorer


class Scorers:
    """The two signals of a run, each a weighted sum. Embedded scorers share one forward of the frozen model."""

    def __init__(self, reward: Sequence[Part], cost: Sequence[Part], clamp: float) -> None:
        self.parts, self.clamp = {"reward": tuple(reward), "cost": tuple(cost)}, clamp

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], reading: Reading | None = None) -> Scores:
        """Scores of B pairs. UserError that names scorer and prompt when a score is not finite.

        reading: what the reference's forward found about the same rows, which embedded scorers need not compute again.
        """
        parts = [(signal, part) for signal in SIGNALS for part in self.parts[signal]]
        sums = {signal: torch.zeros(len(prompts)) for signal in SIGNALS}
        found = score_each([part.scorer for _, part in parts], prompts, responses, reading)
        for (signal, part), values in zip(parts, found, strict=True):
            require_finite(f"scoring.{signal} {part.name!r}", values, prompts)
            sums[signal] += part.weight * values
        return Scores(*(sums[signal].clamp(-self.clamp, self.clamp) for signal in SIGNALS))

    def only(self, signal: str) -> Scorer | None:
        """The one scorer of a signal, None where the signal is a sum or weighted."""
        part, *more = self.parts[signal]
        return None if more or part.weight != 1 else part.scorer

    def layers_of(self, model: Any) -> list[int]:
        """Layers of `model` whose states a scorer reads."""
        scorers = [part.scorer for parts in self.parts.values() for part in parts]
        return sorted({s.manifest.layer for s in scorers if isinstance(s, HeadScorer) and s.trunk.model is model})

    def describe(self) -> str:
        """One line: the units of the signals, or the scorers' names, with their weights."""
        return "; ".join(
            f"{signal}: {' + '.join(_describe(signal, p) for p in self.parts[signal])}" for signal in SIGNALS
        )


def score_each(
    scorers: Sequence[Scorer], prompts: Sequence[Prompt], responses: Sequence[str], reading: Reading | None = None
) -> list[Tensor]:
    """Scores (B,) of each scorer, in the units of its manifest; embedded ones share a forward."""
    heads = [s for s in scorers if isinstance(s, HeadScorer)]
    shared = dict(zip(heads, score_all(heads, [p.text for p in prompts], responses, reading), strict=True))
    return [shared[s] if isinstance(s, HeadScorer) else s(prompts, responses) for s in scorers]


def _describe(signal: str, part: Part) -> str:
    manifest = part.scorer.manifest
    weight = "" if part.weight == 1 else f"{part.weight:g} x "
    unchecked = " (sign not checked)" if signal == "cost" and manifest.sign_check is None else ""
    return f"{weight}{manifest.units or part.name}{unchecked}"


def require_finite(where: str, values: Tensor, prompts: Sequence[Prompt]) -> None:
    """UserError that names the prompt of the first score that is not finite."""
    bad = (~values.isfinite()).nonzero()
    if bad.numel():
        row = int(bad[0])
        raise UserError(f"{where} gave {float(values[row])} for a response to the prompt {prompts[row].text[:80]!r}")


def weights_of(config: ScoringConfig, signal: str) -> dict[str, float]:
    """Scorer name -> weight of "reward" or "cost". UserError for a sum of nothing, or a weight of 0 or not finite."""
    value = getattr(config, signal)
    weights = {value: 1.0} if isinstance(value, str) else value
    if not weights:
        raise UserError(f"scoring.{signal} must name at least one scorer; got {value!r}")
    for name, weight in weights.items():
        if weight == 0 or not math.isfinite(weight):
            raise UserError(f"scoring.{signal}: the weight of {name!r} must be finite and not 0; got {weight:g}")
    return weights


def scorer_names(config: ScoringConfig) -> list[str]:
    """All scorers of both signals."""
    return [name for signal in SIGNALS for name in weights_of(config, signal)]


def load_scorers(
    config: ScoringConfig,
    assets: Path | None,
    model: Any = None,
    tokenizer: Any = None,
    device: str = "cpu",
    trust: bool = False,
) -> Scorers:
    """Both signals, with the sign of each scorer checked whose manifest has two canned answers.

    model, tokenizer: the frozen reference, when it is the model the embedded scorers read; else they load their own.
    trust: run Python code that comes with models.
    """
    parts: dict[str, list[Part]] = {signal: [] for signal in SIGNALS}
    for signal in SIGNALS:
        for name, weight in weights_of(config, signal).items():
            scorer: Scorer
            if name == EMBEDDED:
                loaded = (p.scorer.trunk.model for p in parts["reward"] if isinstance(p.scorer, HeadScorer))
                shared = model if model is not None else next(loaded, None)
                scorer = _load_embedded(signal, assets, shared, tokenizer, device)
            elif FUNCTION.fullmatch(name) and not Path(name).exists():
                scorer = FunctionScorer(name, signal, config.timeout)
            else:
                scorer = load_model(name, signal, device, trust)
            check_sign(scorer, f"scoring.{signal} {name!r}")
            parts[signal].append(Part(name, weight, scorer))
    return Scorers(parts["reward"], parts["cost"], config.clamp)


def _load_embedded(signal: str, assets: Path | None, model: Any, tokenizer: Any, device: str) -> HeadScorer:
    if assets is None:
        raise UserError(f"scoring.{signal} is 'embedded' but there is no assets folder; run python -m repo.assets")
    return HeadScorer.load(assets / "scorers" / signal, model=model, tokenizer=tokenizer, device=device)


def check_sign(scorer: Scorer, where: str) -> None:
    """UserError unless the two canned answers of the manifest, if any, score in the order that it declares."""
    check = scorer.manifest.sign_check
    if check is None:
        return
    prompts = [Prompt("sign check", check["prompt"], "")] * 2
    low, high = score_each([scorer], prompts, [check["lower"], check["higher"]])[0].tolist()
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(
            f"{where} has the wrong sign: the canned answers of its manifest must score lower < higher, "
            f"got {low:.3f} and {high:.3f}"
        )
