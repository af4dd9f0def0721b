"""Batch: the tensors that one update reads."""

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
    """B responses with the targets of the losses of policy and critics.

    sequences: tokens of prompts and responses.
    advantages: of reward and cost.
    costs: (B,) raw costs C, for cost_mode "split" and for statistics.
    ref_logps: (B, R) fp32, the reference's log-probabilities of the response tokens in nats.
    lam: weight lambda of the cost.
    beta: weight of the KL, wherever the KL is placed.
    old_logps: (B, R) fp32, the sampling policy's log-probabilities in nats; None if nothing needs them: the
        update has a single optimiser step, in which the ratio is exactly 1, no critics, and the KL in the loss.
    values: by signal, (B, R) the critics' values at sampling; empty without critics.
    cost_limit: the limit of the step, which cost_mode "split" compares costs with; None: algorithm.cost_limit.
    shares: (B, R) what each token has of the penalised cost, by learned credit; None without it.
    """

    sequences: Sequences
    advantages: Advantages
    costs: Tensor
    ref_logps: Tensor
    lam: float
    beta: float
    old_logps: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    cost_limit: float | None = None
    shares: Tensor | None = None


def make_batch(
    config: Config,
    sequences: Sequences,
    scores: Scores,
    ref_logps: Tensor,
    lam: float,
    beta: float,
    predictions: Predictions,
    cost_limit: float | None = None,
    shares: Tensor | None = None,
) -> Batch:
    """Compute the advantages of B scored responses and collect what the losses read.

    sequences, scores: as training.truncation.for_training returns them.
    ref_logps: (B, R) the reference's log-probabilities in nats.
    lam, beta: weights of the cost and of the KL.
    predictions: log-probabilities of the sampling policy and values of its critics.
    cost_limit: limit of the step; None: algorithm.cost_limit.
    shares: (B, R) of learned credit, or None.
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
        sequences.response_lengths > 0 if config.rollout.truncated == "mask" else None,
        cost_limit,
        shares,
    )
    return Batch(sequences, advantages, scores.costs, ref_logps, lam, beta, old, predictions.values, cost_limit, shares)
