"""Batch: what one update reads of a rollout batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..config.schema import Config
from ..data.sequences import Sequences
from ..models.actor import Predictions
from ..scoring.scorers import Scores
from .advantages import Advantages, method_advantages


@dataclass(frozen=True)
class Batch:
    """B responses with everything that the losses of policy and critics compare with.

    costs: (B,) raw costs, for the gate and the statistics. ref_logps, old_logps: (B, R) fp32 log-probabilities in nats
    of the reference and of the policy that sampled; old_logps is None where a single optimiser step makes the ratio
    exactly 1. lam, beta: weight of the cost, and of the KL wherever it is placed. values: by signal, (B, R) the
    critics' values at sampling.
    """

    sequences: Sequences
    advantages: Advantages
    costs: Tensor
    ref_logps: Tensor
    lam: float
    beta: float
    old_logps: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)


def make_batch(
    config: Config,
    sequences: Sequences,
    scores: Scores,
    ref_logps: Tensor,
    lam: float,
    beta: float,
    predictions: Predictions,
) -> Batch:
    """Compute the advantages of B scored responses and put them beside what the losses read.

    ref_logps: (B, R). predictions: of the policy that sampled and of its critics.
    """
    in_reward, old = config.algorithm.kl_placement != "loss", predictions.logps
    log_ratio = old - ref_logps if in_reward and old is not None else None
    advantages = method_advantages(
        config.algorithm,
        config.critic,
        scores.rewards,
        scores.costs,
        sequences.group,
        sequences.response_mask,
        lam,
        log_ratio,
        beta,
        predictions.values,
    )
    return Batch(sequences, advantages, scores.costs, ref_logps, lam, beta, old, predictions.values)
