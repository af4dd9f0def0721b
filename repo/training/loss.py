"""Objective: what one micro-batch adds to the loss of policy and critics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repo_kernels import LossStats, linear_repo_loss

from ..config.schema import Config
from ..data.packing import Packed, flat, unflat
from ..data.prompts import Example
from ..data.sequences import Sequences, make_sequences
from ..models.actor import Actor
from ..models.critic import VALUE_CLIP, value_loss
from ..models.hidden_states import States
from .advantages import Advantages, loss_mode, method_advantages


@dataclass(frozen=True)
class Batch:
    """What one update reads. ref_logps, old_logps: (B, R) fp32, the latter None where a single optimiser step makes the
    ratio exactly 1; costs: (B,) raw costs, for the gate and the statistics; values: by signal, (B, R) of the critics at
    sampling; beta: weight of the KL, wherever it is placed."""

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
    rewards: Tensor,
    costs: Tensor,
    ref_logps: Tensor,
    lam: float,
    beta: float,
    old_logps: Tensor | None,
    values: dict[str, Tensor],
) -> Batch:
    """From scores (B,) and what policy, reference and critics said (B, R) to what an update reads."""
    in_reward = config.algorithm.kl_placement != "loss"
    k = old_logps - ref_logps if in_reward and old_logps is not None else None
    group, mask = sequences.group, sequences.response_mask
    found = method_advantages(config.algorithm, config.critic, rewards, costs, group, mask, lam, k, beta, values)
    return Batch(sequences, found, costs, ref_logps, lam, beta, old_logps, values)


class Objective:
    """The losses of a run's policy and critics, each divided by counts of the whole minibatch, so that the split into
    micro-batches does not change the result."""

    def __init__(self, actor: Actor, config: Config) -> None:
        self.actor, self.algorithm = actor, config.algorithm
        self.temperature, self.budget = config.rollout.temperature, config.optimizer.micro_batch_tokens
        self.ptx_coef = config.ptx.coef

    def backward(self, batch: Batch, rows: Tensor, logps: Tensor | None = None) -> tuple[dict[str, float], LossStats]:
        """Accumulate the gradient of the minibatch `rows`; returns its losses by name and the policy's statistics.

        logps: (B, R), where the response tokens' log-probabilities of this pass are written.
        """
        lengths = batch.sequences.response_lengths[rows]
        tokens, sequences = max(1, int(lengths.sum())), max(1, int((lengths > 0).sum()))
        divisor = tokens if self.algorithm.loss_agg_mode == "token-mean" else sequences
        found, stats = list[dict[str, Tensor]](), []
        said = torch.zeros(batch.ref_logps.shape)
        with self.actor.settings.recomputing():
            for packed in self.actor.own_parts(batch.sequences, rows, self.budget):
                part = packed.to(self.actor.settings.device)
                losses, part_stats, part_logps = self.actor(part, self._reader(batch, part, divisor, tokens))
                torch.stack(list(losses.values())).sum().backward()
                found.append({name: value.detach() for name, value in losses.items()})
                stats.append(part_stats)
                unflat(packed, part_logps, said)
        own = {name: torch.stack([losses[name] for losses in found]).sum().item() for name in found[0]}
        mine = LossStats(stats[0].merge(*stats[1:]).tensor.cpu())
        everyone = self.actor.world.gather((own, mine, said[rows]))
        if logps is not None:
            logps[rows] = torch.stack([part for _, _, part in everyone]).sum(0)
        sums = {name: sum(each[name] for each, _, _ in everyone) for name in own}
        return sums, everyone[0][1].merge(*(each for _, each, _ in everyone[1:]))

    def _reader(self, batch: Batch, packed: Packed, divisor: int, tokens: int) -> Callable[..., Any]:
        """What the actor's forward ends with: (losses by name, statistics, log-probabilities (N,)) of a micro-batch."""
        algorithm = self.algorithm

        def here(value: Tensor) -> Tensor:
            """(B,) or (B, R) of the batch, by token of the micro-batch: (N,)."""
            return flat(packed, value if value.ndim == 2 else value[:, None].expand(-1, packed.width))

        signals: dict[str, Any] = self._signals(batch)
        signals = {name: here(v) if isinstance(v, Tensor) else v for name, v in signals.items()}

        def read(states: States, critics: nn.ModuleDict) -> tuple[dict[str, Tensor], LossStats, Tensor]:
            losses = {
                f"{signal}_value_loss": value_loss(
                    critic(states),
                    here(batch.values[signal]),
                    here(batch.advantages.returns[signal]),
                    VALUE_CLIP,
                    tokens,
                )
                for signal, critic in critics.items()
            }
            out = linear_repo_loss(
                **states.head_arguments(),
                token_ids=packed.token_ids,
                old_logps=None if batch.old_logps is None else here(batch.old_logps),
                **signals,
                cost_limit=algorithm.cost_limit,
                ref_logps=here(batch.ref_logps),
                cu_seqlens=packed.cu_seqlens,
                temperature=self.temperature,
                eps_low=algorithm.clip_range[0],
                eps_high=algorithm.clip_range[1],
                dual_clip=algorithm.dual_clip,
                beta=batch.beta if algorithm.kl_placement == "loss" else 0.0,
                kl_estimator=algorithm.kl_estimator,
                kl_importance_weighted=algorithm.kl_ratio,
                entropy_coef=algorithm.entropy_coef,
                loss_agg_mode=algorithm.loss_agg_mode,
                divisor=divisor,
                return_entropy=True,
            )
            return {"loss": out.loss.clone(), **losses}, out.stats, out.logps  # FSDP2 wants no view

        return read

    def _signals(self, batch: Batch) -> dict[str, Any]:
        """Advantages, cost and lambda as repo_loss takes them; already combined where they are scaled as one."""
        advantages = batch.advantages
        if self.algorithm.scale_by_std or advantages.cost is None:
            return {"reward_advantages": advantages.combined, "costs": batch.costs}
        return {
            "reward_advantages": advantages.reward,
            "cost_advantages": advantages.cost,
            "costs": batch.costs,
            "cost_mode": loss_mode(self.algorithm),
            "lam": batch.lam,
            "normalize": self.algorithm.normalize,
        }

    def supervised_backward(self, examples: Sequence[Example]) -> float:
        """Accumulate the gradient of coef x cross-entropy per response token; returns the cross-entropy in nats."""
        pad_id, device = self.actor.settings.pad_id, self.actor.settings.device
        sequences = make_sequences([e.prompt_ids for e in examples], [e.response_ids for e in examples], pad_id)
        tokens, total = int(sequences.response_lengths.sum()), torch.zeros((), device=device)

        def read(states: States, _: nn.ModuleDict) -> Tensor:
            return -states.logps(1.0).sum() / tokens

        with self.actor.settings.recomputing():
            for packed in self.actor.own_parts(sequences, torch.arange(len(examples)), self.budget):
                loss = self.actor(packed.to(device), read)
                (self.ptx_coef * loss).backward()
                total += loss.detach()
        return sum(self.actor.world.gather(total.item()))
