"""Scorers: the reward and the cost of each response, as weighted sums of embedded scorers, models and functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError, warn_user
from ..config.schema import ScoringConfig
from ..data.prompts import Prompt
from .classifier import ClassifierScorer, load_model
from .embedded import HeadScorer, Reading, score_all
from .function import FunctionScorer
from .manifest import ANSWERS
from .signals import field_of

EMBEDDED = "embedded"
SIGNALS = ("reward", "cost")
FUNCTION = re.compile(r"[^\s/\\:#]+:\w+")

Scorer = HeadScorer | ClassifierScorer | FunctionScorer


@dataclass(frozen=True)
class Scores:
    """The scores of B responses.

    rewards, costs: (B,) fp32 on the CPU, finite, in [-scoring.clamp, scoring.clamp]. A higher cost is more harmful.
    """

    rewards: Tensor
    costs: Tensor


@dataclass(frozen=True)
class Part:
    """A term of a signal's weighted sum. name: of the scorer in the configuration. weight: multiplies its scores."""

    name: str
    weight: float
    scorer: Scorer


class Scorers:
    """The scorers of reward and cost, each signal a weighted sum. Embedded scorers share one forward pass."""

    def __init__(self, reward: Sequence[Part], cost: Sequence[Part], clamp: float) -> None:
        """reward, cost: the terms of each sum. clamp: each sum is clamped to [-clamp, clamp], with a warning once."""
        self.parts, self.clamp = {"reward": tuple(reward), "cost": tuple(cost)}, clamp
        self.clamped: set[str] = set()  # signals that the warning has been given for

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], reading: Reading | None = None) -> Scores:
        """Score B pairs by both signals.

        reading: results of the reference's forward pass over the same rows, which saves embedded scorers one of their
        own. Raises UserError that names scorer and prompt if a score is not finite.
        """
        sums = self._sums(SIGNALS, prompts, responses, reading)
        return Scores(sums["reward"], sums["cost"])

    def costs(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Score only the cost of B pairs, (B,) fp32 on the CPU. Raises UserError if a score is not finite."""
        return self._sums(("cost",), prompts, responses, None)["cost"]

    def _sums(
        self, signals: Sequence[str], prompts: Sequence[Prompt], responses: Sequence[str], reading: Reading | None
    ) -> dict[str, Tensor]:
        """Compute the clamped weighted sum (B,) of each signal."""
        parts = [(signal, part) for signal in signals for part in self.parts[signal]]
        sums = {signal: torch.zeros(len(prompts)) for signal in signals}
        scores = score_each([part.scorer for _, part in parts], prompts, responses, reading)
        for (signal, part), values in zip(parts, scores, strict=True):
            require_finite(f"scoring.{signal} {part.name!r}", values, prompts)
            sums[signal] += part.weight * values
        return {signal: self._clamp(signal, sums[signal]) for signal in signals}

    def _clamp(self, signal: str, values: Tensor) -> Tensor:
        """Clamp scores (B,). The first time that this changes some of a signal, a warning says so."""
        beyond = values[values.abs() > self.clamp]
        if beyond.numel() and signal not in self.clamped:
            self.clamped.add(signal)
            warn_user(
                f"scoring.{signal} gave scores from {float(beyond.min()):g} to {float(beyond.max()):g}, which "
                f"scoring.clamp={self.clamp:g} cuts to {self.clamp:g} in size; raise it if they are meant"
            )
        return values.clamp(-self.clamp, self.clamp)

    def only(self, signal: str) -> Scorer | None:
        """Return the scorer of a signal if it is the only one and has weight 1, else None."""
        part, *more = self.parts[signal]
        return None if more or part.weight != 1 else part.scorer

    def layers_of(self, model: Any) -> list[int]:
        """List the layers of `model`, as indices into hidden_states, that embedded scorers read."""
        scorers = [part.scorer for parts in self.parts.values() for part in parts]
        return sorted({s.manifest.layer for s in scorers if isinstance(s, HeadScorer) and s.trunk.model is model})

    def describe(self) -> str:
        """Describe both signals in one line: the units of each scorer, with its weight."""
        return "; ".join(
            f"{signal}: {' + '.join(_describe(signal, p) for p in self.parts[signal])}" for signal in SIGNALS
        )


def score_each(
    scorers: Sequence[Scorer], prompts: Sequence[Prompt], responses: Sequence[str], reading: Reading | None = None
) -> list[Tensor]:
    """Score B pairs by several scorers; returns (B,) fp32 for each, in the units of its manifest.

    reading: see Scorers. Embedded scorers share one forward pass.
    """
    heads = [s for s in scorers if isinstance(s, HeadScorer)]
    shared = dict(zip(heads, score_all(heads, [p.text for p in prompts], responses, reading), strict=True))
    return [shared[s] if isinstance(s, HeadScorer) else s(prompts, responses) for s in scorers]


def _describe(signal: str, part: Part) -> str:
    """Describe one term of a sum: weight, units, and a note on a cost without a sign check.

    The units are those of the manifest, or else the name and what the scorer gives.
    """
    manifest = part.scorer.manifest
    weight = "" if part.weight == 1 else f"{part.weight:g} x "
    scaled = "" if (manifest.offset, manifest.scale) == (0, 1) else ", by its manifest's offset and scale"
    plain = f"{part.name} ({part.scorer.unit}{scaled})" if isinstance(part.scorer, ClassifierScorer) else part.name
    units = manifest.units or plain
    unchecked = " (sign not checked)" if signal == "cost" and manifest.sign_check is None else ""
    return f"{weight}{units}{unchecked}"


def require_finite(where: str, values: Tensor, prompts: Sequence[Prompt]) -> None:
    """Raise UserError unless all scores (B,) are finite; it names the prompt of the first that is not.

    where: the scorer, for the message.
    """
    bad = (~values.isfinite()).nonzero()
    if bad.numel():
        row = int(bad[0])
        raise UserError(f"{where} gave {float(values[row])} for a response to the prompt {prompts[row].text[:80]!r}")


def weights_of(config: ScoringConfig, signal: str) -> dict[str, float]:
    """Return scorer name -> weight for a signal, "reward" or "cost".

    Raises UserError for an empty sum, and for a weight that is 0 or not finite.
    """
    value = getattr(config, signal)
    weights = {value: 1.0} if isinstance(value, str) else value
    if not weights:
        raise UserError(f"scoring.{signal} must name at least one scorer; got {value!r}")
    for name, weight in weights.items():
        if weight == 0 or not math.isfinite(weight):
            raise UserError(f"scoring.{signal}: the weight of {name!r} must be finite and not 0; got {weight:g}")
    return weights


def scorer_names(config: ScoringConfig) -> list[str]:
    """List the names of the scorers of both signals."""
    return [name for signal in SIGNALS for name in weights_of(config, signal)]


def load_scorers(
    config: ScoringConfig,
    assets: Path | None,
    model: Any = None,
    tokenizer: Any = None,
    device: str = "cpu",
    trust: bool = False,
    date: str | None = None,
    frozen: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Scorers:
    """Load the scorers of both signals and check the sign of those whose manifest has two canned answers.

    Args:
        assets: the assets folder, which the embedded scorers need. model, tokenizer: the frozen reference if it is the
            model that the embedded scorers read; None: they load their own. trust: run Python code of models.
        date: today's date for chat templates, YYYY-MM-DD; None: today.
        frozen: context in which `model` is the frozen reference, where that is a policy without its adapters.

    Raises:
        UserError: a scorer cannot be loaded or has the wrong sign, or a weight is wrong.
    """
    parts: dict[str, list[Part]] = {signal: [] for signal in SIGNALS}
    for signal in SIGNALS:
        for name, weight in weights_of(config, signal).items():
            loaded = (p.scorer.trunk.model for p in parts["reward"] if isinstance(p.scorer, HeadScorer))
            shared = model if model is not None else next(loaded, None)
            scorer = load_scorer(name, signal, config.timeout, assets, shared, tokenizer, device, trust, date, frozen)
            parts[signal].append(Part(name, weight, scorer))
    return Scorers(parts["reward"], parts["cost"], config.clamp)


def load_scorer(
    name: str,
    signal: str,
    timeout: float,
    assets: Path | None,
    model: Any = None,
    tokenizer: Any = None,
    device: str = "cpu",
    trust: bool = False,
    date: str | None = None,
    frozen: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Scorer:
    """Load one scorer by its name in the configuration and check its sign; arguments as for load_scorers.

    signal: "reward", "cost" or "shield", a cost too. timeout: seconds that one call of a function may take. Raises
    UserError as load_scorers.
    """
    scorer: Scorer
    if name == EMBEDDED:
        scorer = _load_embedded(signal, assets, model, tokenizer, device, frozen)
    elif FUNCTION.fullmatch(name) and not Path(name).exists():
        scorer = FunctionScorer(name, signal, timeout)
    else:
        scorer = load_model(name, signal, device, trust, date)
    check_sign(scorer, f"{field_of(signal)} {name!r}")
    return scorer


def _load_embedded(
    signal: str,
    assets: Path | None,
    model: Any,
    tokenizer: Any,
    device: str,
    frozen: Callable[[], AbstractContextManager[None]],
) -> HeadScorer:
    """Load the embedded scorer of a signal. Raises UserError if there is no assets folder."""
    if assets is None:
        raise UserError(f"{field_of(signal)} is 'embedded' but there is no assets folder; run python -m repo.assets")
    folder = assets / "scorers" / ("cost" if signal == "shield" else signal)
    return HeadScorer.load(folder, model=model, tokenizer=tokenizer, device=device, frozen=frozen)


def check_sign(scorer: Scorer, where: str) -> None:
    """Raise UserError unless the manifest's two canned answers, if it has them, score lower < higher.

    where: the scorer, for the message.
    """
    check = scorer.manifest.sign_check
    if check is None:
        return
    columns = {name: value for name, value in check.items() if name not in ANSWERS}
    prompts = [Prompt("sign check", check["prompt"], "", columns=columns)] * 2
    low, high = score_each([scorer], prompts, [check["lower"], check["higher"]])[0].tolist()
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(
            f"{where} has the wrong sign: the canned answers of its manifest must score lower < higher, "
            f"got {low:.3f} and {high:.3f}"
        )
