"""The held-out judge: a verdict on each held-out response by a model or function that took no part in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..data.prompts import Prompt
from .classifier import ClassifierScorer, load_model
from .embedded_judge import EmbeddedJudge
from .function import FunctionScorer
from .scorers import EMBEDDED, FUNCTION, require_finite

NONE = "none"


@dataclass(frozen=True)
class Verdicts:
    """Verdicts on B responses, on the CPU.

    safe: (B,) bool. topicality: (B,) fp32, the cosine of the sentence vectors of prompt and response. topical: (B,)
    bool, true for responses on the topic of their prompt. Both are None where the judge has no sentence encoder.
    """

    safe: Tensor
    topicality: Tensor | None = None
    topical: Tensor | None = None


Judge = Callable[[Sequence[Prompt], Sequence[str]], Verdicts]
"""Function that judges responses to prompts."""


@dataclass(frozen=True)
class ScorerJudge:
    """A judge that calls a response safe iff its score is <= 0. name: of the scorer in the configuration."""

    name: str
    scorer: ClassifierScorer | FunctionScorer

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Verdicts:
        """Judge B responses. Raises UserError if a score is not finite."""
        scores = self.scorer(prompts, responses)
        require_finite(f"evaluation.judge {self.name!r}", scores, prompts)
        return Verdicts(scores <= 0)


@dataclass(frozen=True)
class TextJudge:
    """The embedded judge, given prompts of the data."""

    judge: EmbeddedJudge

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Verdicts:
        """Judge B responses."""
        verdict = self.judge([p.text for p in prompts], list(responses))
        return Verdicts(verdict.safe, verdict.topicality, verdict.topical)


def load_judge(
    name: str, assets: Path | None, device: str, timeout: float, trust: bool = False, date: str | None = None
) -> Judge | None:
    """Load the judge that evaluation.judge names; returns None for "none", and for "embedded" without assets.

    Other judges are scorers as in scoring.cost: a response is safe iff its score, after the manifest's offset and
    scale, is <= 0.

    assets: the assets folder, None if there is none. timeout: seconds that one call of a function may take. trust: run
    Python code that comes with a model. date: today's date for chat templates, YYYY-MM-DD. Raises UserError if the
    judge cannot be loaded.
    """
    if name == NONE or (name == EMBEDDED and assets is None):
        return None
    if name == EMBEDDED and assets is not None:
        return TextJudge(EmbeddedJudge.load(assets / "judge", device=device))
    is_function = FUNCTION.fullmatch(name) and not Path(name).exists()
    scorer = FunctionScorer(name, "judge", timeout) if is_function else load_model(name, "judge", device, trust, date)
    return ScorerJudge(name, scorer)
