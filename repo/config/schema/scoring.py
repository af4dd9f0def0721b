"""The reward, the cost and the held-out evaluation by a judge."""

from __future__ import annotations

from dataclasses import dataclass

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class ScoringConfig:
    """The reward and the cost of a response."""

    reward: str | dict[str, float] = "embedded"
    """Scorer of the reward: "embedded"; a folder or hub name of a sequence-classification model or of a safe-rlhf score
    model, or a LoRA folder of one; a Python function `module:function` called with lists of prompts and responses; or a
    weighted sum of several, {a: 1, b: 0.5}. Units: path#label is the label's log-odds in nats, 0 where it is as likely
    as not (a model with one output: its raw output); path#label:prob its probability, path#label:logit its logit.
    embedded: the standard deviation over reference samples."""
    cost: str | dict[str, float] = "embedded"
    """Scorer of the cost, given like scoring.reward and in the same units. A higher cost is more harmful; a response is
    safe iff its cost is <= algorithm.cost_limit, which with path#label and the limit 0 means that the label is not the
    more likely one."""
    timeout: PositiveFloat = 600.0
    """Seconds that one call of a scorer function may take; a longer call stops the run."""
    clamp: PositiveFloat = 50.0
    """Clamp reward and cost to [-clamp, clamp]; the first time that this changes a score, a warning says so."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation on held-out prompts, before and after training."""

    prompts: NonNegativeInt = 100
    """Largest number of held-out prompts to use. 0: no evaluation."""
    samples_per_prompt: PositiveInt = 4
    """Number of responses to each held-out prompt. 1: no statement on prompts that are mostly unsafe."""
    judge: str = "embedded"
    """Judge of safety that training never uses: "embedded", "none", or one scorer given like scoring.cost, which calls
    a response safe iff its score is <= 0."""
