"""Critics: a value per response token for the reward and for the cost, and what they are trained on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..config.schema import CriticConfig
from ..scoring.classifier import ClassifierScorer
from ..scoring.embedded import HeadManifest, HeadScorer
from ..scoring.scorers import Scorers
from .attention import choose_attention
from .hidden_states import States, trunk_states
from .policy import Policy

VALUE_CLIP = 5.0  # Safe RLHF's


class Critic(nn.Module):
    """A linear head on states of the policy (trunk None), which it reads without moving them, or of its own trunk."""

    def __init__(self, size: int, trunk: Any = None, embedded: HeadManifest | None = None) -> None:
        """embedded: read states as this scorer does, its layer averaged over the response so far, in its units (but
        without its fluency penalty), plus a linear term that begins as 0 and leaves the sigmoid's range."""
        super().__init__()
        self.trunk, self.embedded = trunk, embedded
        self.layer = embedded.layer if embedded is not None and trunk is None else -1
        self.head = nn.Linear(size, 1)
        self.rest = nn.Linear(size, 1) if embedded is not None else None
        for layer in (self.head, self.rest):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.attention = None if trunk is None else choose_attention(trunk, trunk.device, trunk.dtype)

    def forward(self, policy_states: States) -> Tensor:
        """(N,) fp32 V_t, the value before each response token; the policy's states are read without a trunk only."""
        packed = policy_states.packed
        if self.trunk is not None:
            states = States(packed, trunk_states(self.trunk, packed), None).before()
        else:
            states = policy_states.before(self.layer).detach()
        if self.embedded is None or self.rest is None:
            return self.head(states.float()).squeeze(-1)
        mean = _mean_so_far(states.float(), packed.lengths)
        score = (torch.sigmoid(self.head(mean)) - self.embedded.offset) / self.embedded.scale
        return (score + self.rest(mean)).squeeze(-1)


def _mean_so_far(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """(N, H) of responses one after another: row t is the mean over rows 1 to t of its response, those of the tokens
    before t; row 0 is the prompt's."""
    means = []
    for rows in states.split(list(lengths)):
        count = torch.arange(1, max(1, len(rows)), device=states.device)
        means += [rows[:1], rows[1:].cumsum(0) / count[:, None]]
    return torch.cat(means)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float, divisor: int) -> Tensor:
    """1/2 mean max((V - G)^2, (V_old + clip(V - V_old, +-clip) - G)^2) over tokens. Source: PPO, arXiv 1707.06347.

    values, old, returns: (N,) V, V_old, G. divisor: tokens of the whole minibatch. Returns ().
    """
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).sum() / divisor


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(G - V) / Var(G) over response tokens: 1 is perfect, 0 a constant; NaN where G is constant."""
    returns, error = returns[mask].double(), (returns - values)[mask].double()
    return (1 - error.var(correction=0) / returns.var(correction=0)).item() if bool(returns.var() > 0) else float("nan")


def make_critics(
    config: CriticConfig, policy: Policy, scorers: Scorers, signals: Sequence[str], same_trunk: bool = False
) -> nn.ModuleDict:
    """One critic per signal ("reward", "cost"), on the policy's device.

    same_trunk: the embedded scorers read the model that the policy starts from, so that their heads fit its states.
    """
    critics = {signal: _make_critic(config, policy, scorers, signal, same_trunk) for signal in signals}
    return nn.ModuleDict(critics).to(policy.device)


def _make_critic(config: CriticConfig, policy: Policy, scorers: Scorers, signal: str, same_trunk: bool) -> Critic:
    scorer, own = scorers.only(signal), config.init_from == "scorers"
    if isinstance(scorer, HeadScorer) and scorer.manifest.pooling == "mean" and (own or same_trunk):
        trunk = _cut(scorer.trunk.model.base_model, scorer.manifest.layer) if own else None
        tokenizer, (weight, bias) = scorer.trunk.tokenizer, (scorer.weight, scorer.bias)
        critic = Critic(weight.numel(), trunk, scorer.manifest)
    elif not own:
        return Critic(policy.model.config.get_text_config().hidden_size)
    elif isinstance(scorer, ClassifierScorer):
        tokenizer, (weight, bias) = scorer.tokenizer, scorer.head()
        critic = Critic(weight.numel(), copy.deepcopy(scorer.trunk).float().requires_grad_(True))
    else:
        raise UserError(
            f"critic.init_from scorers needs scoring.{signal} to be one model, neither a sum nor a function"
        )
    if tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(f"critic.init_from scorers: the tokenizer of scoring.{signal} differs from the policy's")
    with torch.no_grad():
        critic.head.weight.copy_(weight[None])
        critic.head.bias.copy_(bias)
    return critic


def _cut(trunk: Any, layers: int) -> Any:
    """A trainable copy of the first layers, without the final norm."""
    trunk = copy.deepcopy(trunk).requires_grad_(True)
    trunk.layers, trunk.norm = trunk.layers[:layers], nn.Identity()
    return trunk
