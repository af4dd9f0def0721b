"""Rehearsal: try the scorers on the data's prompts and on canned answers, before anything is sampled or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..data.prompts import Prompt
from .classifier import ClassifierScorer
from .embedded import HeadScorer
from .function import FunctionScorer
from .judge import Judge, ScorerJudge
from .scorers import SIGNALS, Part, Scorers, require_finite, score_each
from .signals import field_of

CANNED = {
    "reward": (
        "blah blah xyz blah blah",
        "Here is an answer, with its reasons: first the facts, and then what follows.",
    ),
    "cost": (
        "I'm sorry, but I can't help with that.",
        "Take a knife and stab them to death. You stupid idiot, I hate you.",
    ),
}
"""By signal two answers, of which the second should score higher, whatever the prompt."""
KINDS = {"reward": ("nonsense", "an answer"), "cost": ("a refusal", "a harmful answer")}


def rehearse(
    scorers: Scorers, judge: Judge | None, prompts: Mapping[str, Sequence[Prompt]], response_tokens: int
) -> list[str]:
    """Try all scorers but the embedded ones, whose manifests are checked already.

    Args:
        prompts: tokenised prompts by the field that names their source. response_tokens: the most tokens of a response.

    Returns:
        Warnings: scores that do not tell the canned answers apart or have them the wrong way round, and responses that
        may exceed a classifier's context.

    Raises:
        UserError: a scorer fails, gives no finite number for each answer, needs a column that the prompts lack, or
            cannot read a prompt.
    """
    parts = {signal: scorers.parts[signal] for signal in SIGNALS}
    if isinstance(judge, ScorerJudge):
        parts["judge"] = (Part(judge.name, 1.0, judge.scorer),)
    warnings: list[str] = []
    for part in (part for of_signal in parts.values() for part in of_signal):
        warnings += _check_prompts(part, prompts, response_tokens)
    tried = next((list(some) for some in prompts.values() if some), [])
    tried = list({id(p): p for p in (tried[0], tried[-1])}.values()) if tried else []
    for signal, of_signal in parts.items():
        if tried and not any(isinstance(part.scorer, HeadScorer) for part in of_signal):
            warnings += _try_canned(signal, of_signal, tried)
    return warnings


def _check_prompts(part: Part, prompts: Mapping[str, Sequence[Prompt]], response_tokens: int) -> list[str]:
    """Check that a scorer can read the prompts of each source; returns warnings."""
    warnings = []
    for source, some in prompts.items():
        if isinstance(part.scorer, FunctionScorer) and some:
            part.scorer.columns_for(some, source)
        elif isinstance(part.scorer, ClassifierScorer):
            warnings.append(part.scorer.check_prompts(some, response_tokens))
    return [warning for warning in dict.fromkeys(warnings) if warning]


def _try_canned(signal: str, parts: Sequence[Part], prompts: Sequence[Prompt]) -> list[str]:
    """Score the canned answers to each prompt by one signal; returns warnings about its sum."""
    kind = "reward" if signal == "reward" else "cost"
    field, answers, count = field_of(signal), CANNED[kind], len(prompts)
    low, high = torch.zeros(count), torch.zeros(count)
    for part in parts:
        pairs = [*prompts, *prompts]
        (scores,) = score_each([part.scorer], pairs, [answers[0]] * count + [answers[1]] * count)
        require_finite(f"{field} {part.name!r}", scores, pairs)
        low, high = low + part.weight * scores[:count], high + part.weight * scores[count:]
    if len(parts) == 1 and parts[0].scorer.manifest.sign_check is not None:
        return []
    names = " + ".join(repr(part.name) for part in parts)
    lower, higher = KINDS[kind]
    if bool((torch.cat([low, high]) == low[0]).all()):
        return [f"{field} {names} gave {low[0]:g} to {lower} and to {higher} alike; does it read the response?"]
    if float(high.mean()) < float(low.mean()):
        told = f"{high.mean():.3g} to {higher} and {low.mean():.3g} to {lower}"
        better = "a higher reward is better" if kind == "reward" else "a higher cost is more harmful"
        return [f"{field} {names} gave {told}; is its sign right? {better}"]
    return []
