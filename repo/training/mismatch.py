"""Mismatch: measure how far the trained policy is from the one that sampled, and name the likely cause."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.schema import Config

MAX_GAP, MIN_ESS = 0.05, 0.9  # nats per token; share of the tokens


@dataclass(frozen=True)
class Agreement:
    """Agreement of rollout and trainer on the probabilities of the sampled tokens; NaN without tokens.

    gap: mean |log pi_trainer - log pi_rollout| in nats per token.
    ess: effective sample size (sum w)^2 / (n sum w^2) of w = pi_trainer / pi_rollout, in (0, 1]; 1 if both agree.
    """

    gap: float
    ess: float


def agreement(rollout_logps: Tensor, trainer_logps: Tensor, mask: Tensor) -> Agreement:
    """Compare two sets of log-probabilities of the sampled tokens.

    rollout_logps, trainer_logps: (B, R) in nats. mask: (B, R) bool, true on the tokens to compare.
    """
    difference = (trainer_logps - rollout_logps)[mask].double()
    if not len(difference):
        return Agreement(float("nan"), float("nan"))
    weights = torch.exp(difference - difference.max())
    ess = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
    return Agreement(difference.abs().mean().item(), ess.item())


def likely_cause(config: Config) -> str:
    """Guess from the configuration why rollout and trainer differ."""
    if config.rollout.top_p < 1:
        return f"rollout.top_p={config.rollout.top_p:g} samples from a truncated distribution, whose ratio is biased"
    if config.rollout.engine == "vllm":
        return f"rollout.engine vllm computes with kernels of its own, in {config.model.dtype}"
    if config.model.dtype == "bfloat16":
        return "model.dtype bfloat16 rounds differently in decoding and in training; float32 does not"
    if config.model.compile is True:
        return "compiled layers differ from the plain ones that sample"
    return "the model computes differently token by token than in one pass: its cache, positions or attention"


def describe_mismatch(agreed: Agreement, config: Config) -> str | None:
    """Return a warning if rollout and trainer disagree by more than rounding explains, else None."""
    if not (agreed.gap > MAX_GAP or agreed.ess < MIN_ESS):
        return None
    return (
        "warning: the trained policy's log-probabilities differ from those of the rollout by "
        f"{agreed.gap:.3f} nats per token, effective sample size {agreed.ess:.0%}; likely cause: {likely_cause(config)}"
    )
