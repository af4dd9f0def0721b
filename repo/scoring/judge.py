"""The held-out judge: a verdict on each held-out response by something that took no part in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ..data.prompts import Prompt
from .classifier import load_model
from .embedded_judge import EmbeddedJudge
from .function import FunctionScorer
from .scorers import EMBEDDED, FUNCTION, require_finite

Judge = Callable[[Sequence[Prompt], Sequence[str]], Tensor]
"""Prompts and responses -> (B,) bool on the CPU, whether each response is safe."""

NONE = "none"


def load_judge(name: str, assets: Path | None, device: str, timeout: float, trust: bool = False) -> Judge | None:
    """The judge that evaluation.judge names; None for "none", or where "embedded" has no assets.

    Other judges are scorers like scoring.cost: a response is safe iff its score, after the offset of their manifest,
    is <= 0. UserError when one cannot be loaded.
    """
    if name == NONE or (name == EMBEDDED and assets is None):
        return None
    if name == EMBEDDED and assets is not None:
        judge = EmbeddedJudge.load(assets / "judge", device=device)
        return lambda prompts, responses: judge([p.text for p in prompts], list(responses)).safe
    is_function = FUNCTION.fullmatch(name) and not Path(name).exists()
    scorer = FunctionScorer(name, "judge", timeout) if is_function else load_model(name, "judge", device, trust)

    def verdict(prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        scores = scorer(prompts, responses)
        require_finite(f"evaluation.judge {name!r}", scores, prompts)
        return scores <= 0

    return verdict
