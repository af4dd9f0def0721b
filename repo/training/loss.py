"""Losses of a micro-batch, as modules that the actor's forward pass ends with.

PolicyLoss computes the ratio, the clipping and the KL from advantages that training.advantages has made, {C - d}^+
included; its kernel (repo_kernels.LinearRepoLoss) forms the logits one chunk at a time. SupervisedLoss is a
cross-entropy that keeps the policy from forgetting. Both divide by counts of the whole minibatch, so that splitting it
into micro-batches and processes does not change the result.
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
    """Targets of the losses of one micro-batch of N response tokens; tensors are (N,) on the policy's device.

    reward_advantages: advantages of the reward, or of reward and cost combined.
    cost_advantages: advantages of the cost; None if reward_advantages are combined.
    costs: raw cost C of each token's response.
    cost_limit: limit of the step, which costs are compared with.
    old_logps: the sampling policy's log-probabilities in nats; None if the ratio is exactly 1.
    ref_logps: the reference's log-probabilities in nats.
    old_values, returns: by signal, the critic's values at sampling and its targets.
    lam, beta: weights of the cost and of the KL.
    divisor: count that the policy loss is divided by: tokens or sequences of the whole minibatch, by loss_agg_mode.
    tokens: response tokens of the whole minibatch, which value losses are divided by.
    """

    reward_advantages: Tensor
    cost_advantages: Tensor | None
    costs: Tensor
    cost_limit: float
    old_logps: Tensor | None
    ref_logps: Tensor
    old_values: dict[str, Tensor]
    returns: dict[str, Tensor]
    lam: float
    beta: float
    divisor: int
    tokens: int


class MicroBatchLoss(NamedTuple):
    """Result of one micro-batch.

    losses: by name, 0-d tensors whose sum is differentiated.
    stats: statistics of the policy loss.
    logps: (N,) log-probabilities of the response tokens in nats.
    """

    losses: dict[str, Tensor]
    stats: LossStats
    logps: Tensor


def make_targets(batch: Batch, packed: Packed, algorithm: AlgorithmConfig, divisor: int, tokens: int) -> Targets:
    """Gather a batch's values for each response token of a micro-batch. divisor, tokens: see Targets."""

    def by_token(value: Tensor) -> Tensor:
        return flat(packed, value if value.ndim == 2 else value[:, None].expand(-1, packed.width))

    advantages = batch.advantages
    combined = combines(algorithm)
    return Targets(
        reward_advantages=by_token(advantages.combined if combined else advantages.reward),
        cost_advantages=None if combined or advantages.cost is None else by_token(advantages.cost),
        costs=by_token(batch.costs),
        cost_limit=algorithm.cost_limit if batch.cost_limit is None else batch.cost_limit,
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
    """RePO's loss of the policy, and the value loss of each critic, for one micro-batch."""

    def __init__(self, algorithm: AlgorithmConfig, temperature: float, softcap: float | None) -> None:
        """Fix the options that stay the same over a run.

        temperature: sampling temperature. softcap: bound of the policy's logits, None if the model has none.
        """
        super().__init__()
        self.in_loss = algorithm.kl_placement == "loss"
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
            cost_limit=targets.cost_limit,
            lam=0.0 if targets.cost_advantages is None else targets.lam,
            ref_logps=targets.ref_logps,
            beta=targets.beta if self.in_loss else 0.0,
            cu_seqlens=states.packed.cu_seqlens,
            divisor=targets.divisor,
        )
        # sharded training hooks the tensors of the result and takes no views: hence the clone
        return MicroBatchLoss({"loss": out.loss.clone(), **value_losses}, out.stats, out.logps)


def combines(algorithm: AlgorithmConfig) -> bool:
    """Tell whether the advantages of reward and cost are combined before they enter the loss.

    They are if one standard deviation of the group scales both, or if the method has no multiplier lambda.
    """
    return algorithm.scale_by_std or loss_mode(algorithm) is None


def loss_options(algorithm: AlgorithmConfig, temperature: float, softcap: float | None) -> LossOptions:
    """Return the options of the loss that stay the same over a run; arguments as for PolicyLoss."""
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
    """Mean cross-entropy of supervised responses, in nats per token."""

    def forward(self, states: States, _: nn.ModuleDict, tokens: int) -> Tensor:
        """Compute -sum log pi / tokens (0-d). tokens: response tokens of all examples of the optimiser step."""
        return -states.logps(1.0).sum() / tokens
