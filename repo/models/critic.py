"""Critics: the value functions of reward and cost, with a value per response token, and their loss."""

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
from .hidden_states import States, trunk_states
from .layout import choose_attention
from .policy import Policy

VALUE_CLIP = 5.0  # as in Safe RLHF


class Critic(nn.Module):
    """A linear head on the policy's hidden states, which it does not train, or on those of a trunk of its own."""

    def __init__(self, size: int, trunk: Any = None, embedded: HeadManifest | None = None) -> None:
        """Make a critic whose linear layers start at 0.

        size: H, the width of the states. trunk: its own trunk; None: read the policy's states.
        embedded: read states as this scorer does, i.e. average its layer over the response so far and apply a sigmoid,
        in its units but without the fluency penalty. A second linear layer is added, so that values can leave the
        sigmoid's range. None: a linear head on the last layer's states.
        """
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
        """Compute V_t (N,) fp32, the value before each response token.

        policy_states: a critic with its own trunk uses only their packed inputs.
        """
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
    """Average states (N, H) of responses, laid one after another, over each response so far.

    Row 0 of a response, the state of the last prompt token, stays. Row t is the mean of rows 1 to t, the states of the
    tokens before token t.
    """
    means = []
    for rows in states.split(list(lengths)):
        count = torch.arange(1, max(1, len(rows)), device=states.device)
        means += [rows[:1], rows[1:].cumsum(0) / count[:, None]]
    return torch.cat(means)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float, divisor: int) -> Tensor:
    """Compute the clipped value loss, 0-d. Source: PPO, arXiv 1707.06347.

        1/2 sum max((V - G)^2, (V_old + clip(V - V_old, -clip, clip) - G)^2) / divisor

    values, old, returns: (N,) V, V_old and G of response tokens. divisor: response tokens of the whole minibatch.
    """
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).sum() / divisor


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Compute 1 - Var(G - V) / Var(G) over response tokens: 1 for perfect values, 0 for constant ones.

    values, returns, mask: of one shape; the mask is true on the entries that count. Returns NaN if G is constant.
    """
    returns, error = returns[mask].double(), (returns - values)[mask].double()
    return (1 - error.var(correction=0) / returns.var(correction=0)).item() if bool(returns.var() > 0) else float("nan")


def make_critics(
    config: CriticConfig, policy: Policy, scorers: Scorers, signals: Sequence[str], same_trunk: bool = False
) -> nn.ModuleDict:
    """Make one critic per signal, "reward" or "cost", on the policy's device.

    same_trunk: the policy starts as the model that the embedded scorers read, so that their heads fit its states.
    Raises UserError if critic.init_from is "scorers" and a scorer is not one model, or has another tokenizer.
    """
    critics = {signal: _make_critic(config, policy, scorers, signal, same_trunk) for signal in signals}
    return nn.ModuleDict(critics).to(policy.device)


def _make_critic(config: CriticConfig, policy: Policy, scorers: Scorers, signal: str, same_trunk: bool) -> Critic:
    """Make the critic of one signal, with the scorer's head where it fits, else with a head of zeros."""
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
    """Make a trainable copy of a trunk's first `layers` layers, without the final norm."""
    trunk = copy.deepcopy(trunk).requires_grad_(True)
    trunk.layers, trunk.norm = trunk.layers[:layers], nn.Identity()
    return trunk
