"""The losses of a micro-batch, as modules that the actor's forward ends with.

PolicyLoss is where the hinge, the ratio, the clipping and the KL are computed, in one pass of a kernel over the logits
(repo_kernels.LinearRepoLoss); SupervisedLoss is the cross-entropy against forgetting. Both divide by counts of the
whole minibatch, so that its split into micro-batches and processes does not change the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from repo_kernels import LinearRepoLoss, LossOptions, LossStats

from ..config.schema import AlgorithmConfig
from ..data.packing import Packed, flat
from ..models.critic import VALUE_CLIP, value_loss
from ..models.hidden_states import States
from .advantages import loss_mode
from .batch import Batch


@dataclass(frozen=True)
class Targets:
    """What the losses of one micro-batch of N response tokens compare with, each (N,) on the policy's device.

    cost_advantages is None where they are already combined with the reward's. old_logps is None where the ratio is
    exactly 1. old_values, returns: by signal. lam, beta: weights of cost and KL. divisor: tokens or sequences of the
    whole minibatch, by the aggregation. tokens: response tokens of the whole minibatch.
    """

    reward_advantages: Tensor
    cost_advantages: Tensor | None
    costs: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor
    old_values: dict[str, Tensor]
    returns: dict[str, Tensor]
    lam: float
    beta: float
    divisor: int
    tokens: int


class MicroBatchLoss(NamedTuple):
    """losses: by name, 0-d, to be added. stats: the policy's statistics. logps: (N,) of the response tokens."""

    losses: dict[str, Tensor]
    stats: LossStats
    logps: Tensor


def make_targets(batch: Batch, packed: Packed, algorithm: AlgorithmConfig, divisor: int, tokens: int) -> Targets:
    """Lay the columns of a batch out by token of a micro-batch. divisor, tokens: see Targets."""

    def by_token(value: Tensor) -> Tensor:
        return flat(packed, value if value.ndim == 2 else value[:, None].expand(-1, packed.width))

    advantages = batch.advantages
    combined = combines(algorithm)
    return Targets(
        reward_advantages=by_token(advantages.combined if combined else advantages.reward),
        cost_advantages=None if combined or advantages.cost is None else by_token(advantages.cost),
        costs=by_token(batch.costs),
        old_logps=None if batch.old_logps is None else by_token(batch.old_logps),
        ref_logps=by_token(batch.ref_logps),
        old_values={signal: by_token(values) for signal, values in batch.values.items()},
        returns={signal: by_token(returns) for signal, returns in advantages.returns.items()},
        lam=batch.lam,
        beta=batch.beta,
        divisor=divisor,
        tokens=tokens,
    )


class PolicyLoss(nn.Module):
    """RePO's loss of the policy, and the value loss of each critic."""

    def __init__(self, algorithm: AlgorithmConfig, temperature: float, softcap: float | None) -> None:
        """temperature: of sampling. softcap: of the policy's logits, None where it has none."""
        super().__init__()
        self.cost_limit, self.in_loss = algorithm.cost_limit, algorithm.kl_placement == "loss"
        self.repo_loss = LinearRepoLoss(loss_options(algorithm, temperature, softcap))

    def forward(self, states: States, critics: nn.ModuleDict, targets: Targets) -> MicroBatchLoss:
        """Compute the losses of one micro-batch from its hidden states; everything is divided by minibatch counts."""
        value_losses = {
            f"{signal}_value_loss": value_loss(
                critic(states), targets.old_values[signal], targets.returns[signal], VALUE_CLIP, targets.tokens
            )
            for signal, critic in critics.items()
        }
        out = self.repo_loss(
            **states.head_arguments(),
            token_ids=states.packed.token_ids,
            old_logps=targets.old_logps,
            reward_advantages=targets.reward_advantages,
            cost_advantages=targets.cost_advantages,
            costs=targets.costs,
            cost_limit=self.cost_limit,
            lam=0.0 if targets.cost_advantages is None else targets.lam,
            ref_logps=targets.ref_logps,
            beta=targets.beta if self.in_loss else 0.0,
            cu_seqlens=states.packed.cu_seqlens,
            divisor=targets.divisor,
        )
        # sharded training hooks the tensors of the result and takes no views: hence the clone
        return MicroBatchLoss({"loss": out.loss.clone(), **value_losses}, out.stats, out.logps)


def combines(algorithm: AlgorithmConfig) -> bool:
    """Tell whether the advantages of reward and cost enter the loss already combined.

    They do where they are scaled as one by the group's deviation, and with methods without a multiplier.
    """
    return algorithm.scale_by_std or loss_mode(algorithm) is None


def loss_options(algorithm: AlgorithmConfig, temperature: float, softcap: float | None) -> LossOptions:
    """Choose the options of the loss that stay the same over a run."""
    combined = combines(algorithm)
    return LossOptions(
        cost_mode="rectified" if combined else loss_mode(algorithm) or "rectified",
        normalize=algorithm.normalize and not combined,
        temperature=temperature,
        softcap=softcap,
        eps_low=algorithm.clip_range[0],
        eps_high=algorithm.clip_range[1],
        dual_clip=algorithm.dual_clip,
        kl_estimator=algorithm.kl_estimator,
        kl_importance_weighted=algorithm.kl_importance_weighted,
        entropy_coef=algorithm.entropy_coef,
        loss_agg_mode=algorithm.loss_agg_mode,
        return_entropy=True,
    )


class SupervisedLoss(nn.Module):
    """Cross-entropy of given responses, in nats per token."""

    def forward(self, states: States, _: nn.ModuleDict, tokens: int) -> Tensor:
        """Compute -sum log pi / tokens, 0-d. tokens: response tokens of all examples of the optimiser step."""
        return -states.logps(1.0).sum() / tokens
