"""Watchdog: is the policy that was trained the one that sampled, and are its weights still numbers?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common.distributed import World
from ..common.errors import UserError
from ..config.schema import Config
from ..models.sharding import local

MAX_GAP, MIN_ESS = 0.05, 0.9  # nats per token; share of the tokens


@dataclass(frozen=True)
class Agreement:
    """Of rollout and trainer on the sampled tokens. gap: mean |log pi_trainer - log pi_rollout|, nats per token; ess:
    effective sample size (sum w)^2 / (n sum w^2) of w = pi_trainer / pi_rollout, 1 where they are equal. Both are NaN
    without tokens."""

    gap: float
    ess: float


def agreement(rollout_logps: Tensor, trainer_logps: Tensor, mask: Tensor) -> Agreement:
    """Both (B, R) fp32 log-probabilities of the sampled tokens; mask: (B, R) bool."""
    difference = (trainer_logps - rollout_logps)[mask].double()
    if not len(difference):
        return Agreement(float("nan"), float("nan"))
    weights = torch.exp(difference - difference.max())
    ess = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
    return Agreement(difference.abs().mean().item(), ess.item())


def likely_cause(config: Config) -> str:
    """Why rollout and trainer differ, by what is configured."""
    if config.rollout.top_p < 1:
        return f"rollout.top_p={config.rollout.top_p:g} samples from a truncated distribution, whose ratio is biased"
    if config.model.dtype == "bfloat16":
        return "model.dtype bfloat16 rounds differently in decoding and in training; float32 does not"
    if config.model.compile:
        return "compiled layers differ from the plain ones that sample"
    return "the model computes otherwise token by token than in one pass: its cache, positions or attention"


def warning_of(found: Agreement, config: Config) -> str | None:
    """A sentence where rollout and trainer disagree more than rounding explains."""
    if not (found.gap > MAX_GAP or found.ess < MIN_ESS):
        return None
    return (
        f"warning: the policy that is trained is not quite the one that sampled: their log-probabilities differ by "
        f"{found.gap:.3f} nats per token, effective sample size {found.ess:.0%}; likely cause: {likely_cause(config)}"
    )


@torch.no_grad()
def require_finite_weights(model: nn.Module, world: World, when: str) -> None:
    """UserError that names the first weight with a NaN or an infinity; every process of a sharded run asks."""
    trained = [(name, local(p)) for name, p in model.named_parameters() if p.requires_grad]
    # a sum is finite unless a term is not, or it overflows: only then is the tensor looked at
    bad = next((n for n, p in trained if not bool(p.sum().isfinite()) and not bool(p.isfinite().all())), None)
    if bad := next((name for name in world.gather(bad) if name is not None), None):
        raise UserError(f"weight {bad} is not finite {when}; lower optimizer.lr, or look at the scores")
