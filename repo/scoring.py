"""Scoring: the reward and the cost of each response, from embedded scorers, classifiers or Python functions."""

from __future__ import annotations

import importlib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .assets.heads import HeadScorer, score_all
from .classifier import ClassifierScorer
from .config import ScoringConfig
from .errors import UserError, first_line

EMBEDDED = "embedded"

Scorer = Callable[[Sequence[str], Sequence[str]], Tensor]


@dataclass(frozen=True)
class Scores:
    """rewards, costs: (B,) fp32 on the CPU, finite, clamped to +- scoring.clamp. Higher cost is more harmful."""

    rewards: Tensor
    costs: Tensor


class FunctionScorer:
    """A Python function `module:function` called as f(prompts, responses) with two lists of B strings.

    It returns B numbers: a list, an array or a tensor. The module is looked up in the working directory too.
    """

    def __init__(self, name: str, signal: str) -> None:
        self.name, self.signal = name, signal
        self.function = load_function(name, signal)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """(B,) fp32; UserError when the function raises or returns something else than B numbers."""
        where = f"scoring.{self.signal} {self.name!r}"
        try:
            values = self.function(list(prompts), list(responses))
        except Exception as error:
            raise UserError(f"{where} raised {first_line(error)} ({_place(error)})") from error
        try:
            scores = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{where} must return {len(prompts)} numbers; got {type(values).__name__} ({error})"
            ) from None
        if scores.shape != (len(prompts),):
            raise UserError(f"{where} must return {len(prompts)} numbers; got shape {tuple(scores.shape)}")
        return scores


def load_function(name: str, signal: str) -> Callable[..., Any]:
    """The function `module:function`. UserError says which part is missing."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"scoring.{signal} must be 'embedded', a model folder or 'module:function'; got {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs here
        raise UserError(f"scoring.{signal}: cannot import module {module_name!r}: {first_line(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"scoring.{signal}: module {module_name!r} has no function {attribute!r}")
    return function


def _place(error: BaseException) -> str:
    """File and line where an exception was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


class Scorers:
    """The two signals of a run. Embedded ones share one forward of the frozen model."""

    def __init__(self, reward: Scorer, cost: Scorer, clamp: float) -> None:
        self.reward, self.cost, self.clamp = reward, cost, clamp

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        """Scores of B pairs. UserError that names the prompt when a score is not finite."""
        if isinstance(self.reward, HeadScorer) and isinstance(self.cost, HeadScorer):
            rewards, costs = score_all([self.reward, self.cost], prompts, responses)
        else:
            rewards, costs = self.reward(prompts, responses), self.cost(prompts, responses)
        for signal, values in (("reward", rewards), ("cost", costs)):
            _require_finite(signal, values, prompts)
        return Scores(rewards.clamp(-self.clamp, self.clamp), costs.clamp(-self.clamp, self.clamp))

    def describe(self) -> str:
        """One line: what the signals are and their units."""
        parts = []
        for name, scorer in (("reward", self.reward), ("cost", self.cost)):
            units = scorer.manifest.units if isinstance(scorer, HeadScorer) else getattr(scorer, "name", repr(scorer))
            parts.append(f"{name}: {units}")
        return "; ".join(parts)


def _require_finite(signal: str, values: Tensor, prompts: Sequence[str]) -> None:
    bad = (~values.isfinite()).nonzero()
    if bad.numel():
        row = int(bad[0])
        raise UserError(
            f"scoring.{signal} gave {float(values[row])} for a response to the prompt {prompts[row][:80]!r}"
        )


def load_scorers(
    config: ScoringConfig, assets: Path | None, model: Any = None, tokenizer: Any = None, device: str = "cpu"
) -> Scorers:
    """Both signals, with the sign of an embedded cost checked on its two canned answers.

    model, tokenizer: the frozen reference, when it is the model the embedded scorers read; else they load their own.
    """
    scorers: list[Scorer] = []
    for signal, name in (("reward", config.reward), ("cost", config.cost)):
        if name == EMBEDDED:
            if assets is None:
                raise UserError(
                    f"scoring.{signal} is 'embedded' but there is no assets folder; run python -m repo.assets"
                )
            shared = model if model is not None else _trunk_of(scorers)
            scorer = HeadScorer.load(assets / "scorers" / signal, model=shared, tokenizer=tokenizer, device=device)
            check_sign(scorer)
            scorers.append(scorer)
        elif Path(name.partition("#")[0]).is_dir():
            scorers.append(ClassifierScorer(name, signal, device))
        else:
            scorers.append(FunctionScorer(name, signal))
    return Scorers(scorers[0], scorers[1], config.clamp)


def _trunk_of(scorers: list[Scorer]) -> Any:
    return next((s.trunk.model for s in scorers if isinstance(s, HeadScorer)), None)


def check_sign(scorer: HeadScorer) -> None:
    """UserError unless the two canned answers of the manifest score in the order that it declares."""
    check = scorer.manifest.sign_check
    low, high = scorer([check["prompt"]] * 2, [check["lower"], check["higher"]]).tolist()
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(
            f"the {scorer.signal} scorer has the wrong sign: its canned answers must score lower < higher, "
            f"got {low:.3f} and {high:.3f}"
        )
