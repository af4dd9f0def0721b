"""Update: one rollout batch -> optimiser steps on the RePO loss, whatever the micro-batch split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repo_kernels import LossStats, RepoLossOutput, repo_loss

from .advantages import Advantages, loss_mode
from .config import AlgorithmConfig, OptimizerConfig
from .errors import UserError
from .policy import Policy, response_logits, response_logps
from .seeds import generator
from .sequences import Sequences, micro_batches


@dataclass(frozen=True)
class Batch:
    """What one update reads. ref_logps, old_logps: (B, R) fp32, the latter None where a single optimiser step makes the
    ratio exactly 1; costs: (B,) raw costs, for the gate and the statistics."""

    sequences: Sequences
    advantages: Advantages
    costs: Tensor
    ref_logps: Tensor
    lam: float
    old_logps: Tensor | None = None


@dataclass(frozen=True)
class UpdateResult:
    """loss: mean over optimiser steps; grad_norm: of the last one, before clipping; skipped: non-finite steps."""

    loss: float
    grad_norm: float
    lr: float
    skipped: int
    stats: LossStats


def lr_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of a step: linear warm-up, then constant, or cosine / linear to 0 after the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (1 - progress) if config.schedule == "linear" else config.lr


def make_optimizer(policy: Policy, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)


class Updater:
    """The policy's optimiser and the rules of one update."""

    def __init__(
        self, policy: Policy, algorithm: AlgorithmConfig, config: OptimizerConfig, temperature: float, seed: int
    ) -> None:
        self.policy = policy
        self.algorithm = algorithm
        self.config = config
        self.temperature = temperature
        self.seed = seed
        self.optimizer = make_optimizer(policy, config)
        self.skipped_in_a_row = 0

    def update(self, batch: Batch, step: int, steps: int) -> UpdateResult:
        """Epochs x shuffled minibatches x micro-batches.

        Raises UserError after `max_skipped` minibatches in a row whose gradient was not finite.
        """
        lr = lr_at(step, steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses, norms, stats, skipped = [], [], [], 0
        for epoch in range(self.config.epochs):
            for rows in self._minibatches(len(batch.costs), step, epoch):
                loss, minibatch_stats = self.backward(batch, rows)
                norm = torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), self.config.clip_norm).item()
                if math.isfinite(norm) and math.isfinite(loss):
                    self.optimizer.step()
                    self.skipped_in_a_row = 0
                else:
                    skipped += 1
                    self._count_skip(loss, norm)
                self.optimizer.zero_grad(set_to_none=True)
                losses.append(loss)
                norms.append(norm)
                stats.append(minibatch_stats)
        return UpdateResult(sum(losses) / len(losses), norms[-1], lr, skipped, stats[0].merge(*stats[1:]))

    def backward(self, batch: Batch, rows: Tensor) -> tuple[float, LossStats]:
        """Accumulate the gradient of the minibatch `rows`; returns (loss, statistics).

        Every micro-batch is divided by the minibatch's own count, so that the split does not change the result.
        """
        lengths = batch.sequences.response_lengths[rows]
        tokens, sequences = int(lengths.sum()), int((lengths > 0).sum())
        divisor = max(1, tokens if self.algorithm.loss_agg_mode == "token-mean" else sequences)
        loss, stats = 0.0, []
        budget, share = self.config.micro_batch_tokens, self.policy.shares_prefix
        for micro in micro_batches(batch.sequences, rows, budget, share):
            out = self._loss(batch, micro, divisor)
            out.loss.backward()
            loss += out.loss.item()
            stats.append(out.stats)
        return loss, stats[0].merge(*stats[1:])

    def _loss(self, batch: Batch, rows: Tensor, divisor: int) -> RepoLossOutput:
        algorithm, device = self.algorithm, self.policy.device
        part = batch.sequences.select(rows).to(device)
        width = part.response_ids.shape[1]
        signals: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self._signals(batch, rows).items()
        }
        return repo_loss(
            response_logits(self.policy, part),
            part.response_ids,
            None if batch.old_logps is None else batch.old_logps[rows, :width].to(device),
            **signals,
            cost_limit=algorithm.cost_limit,
            ref_logps=batch.ref_logps[rows, :width].to(device),
            response_mask=part.response_mask,
            temperature=self.temperature,
            eps_low=algorithm.eps_low,
            eps_high=algorithm.eps_high,
            dual_clip=algorithm.dual_clip,
            beta=algorithm.beta if algorithm.kl_placement == "loss" else 0.0,
            kl_estimator=algorithm.kl_estimator,
            kl_ratio=algorithm.kl_ratio,
            entropy_coef=algorithm.entropy_coef,
            loss_agg_mode=algorithm.loss_agg_mode,
            divisor=divisor,
            return_entropy=True,
            inplace=True,
        )

    def _signals(self, batch: Batch, rows: Tensor) -> dict[str, Any]:
        """Advantages, cost and lambda as repo_loss takes them; already combined where they are scaled as one."""
        advantages = batch.advantages
        if self.algorithm.scale_by_std or advantages.cost is None:
            return {"reward_advantages": advantages.combined[rows], "costs": batch.costs[rows]}
        return {
            "reward_advantages": advantages.reward[rows],
            "cost_advantages": advantages.cost[rows],
            "costs": batch.costs[rows],
            "mode": loss_mode(self.algorithm),
            "lam": batch.lam,
            "normalize": self.algorithm.normalize,
        }

    @property
    def leaves_the_sampling_policy(self) -> bool:
        """Whether a rollout batch takes more than one optimiser step, so that the ratio needs the old log-probs."""
        return self.config.epochs * self.config.minibatches > 1

    def sampling_logps(self, sequences: Sequences) -> Tensor:
        """(B, R) log-probs of the policy before the update, which sampled the responses."""
        return response_logps(self.policy, sequences, self.temperature, self.config.micro_batch_tokens)

    def _minibatches(self, count: int, step: int, epoch: int) -> list[Tensor]:
        order = torch.randperm(count, generator=generator(self.seed, "minibatches", step, epoch))
        return [rows for rows in order.tensor_split(self.config.minibatches) if rows.numel()]

    def _count_skip(self, loss: float, norm: float) -> None:
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise UserError(
                f"{self.skipped_in_a_row} updates in a row had a non-finite loss or gradient (last: loss {loss}, "
                f"gradient norm {norm}) and were left out; lower optimizer.lr or look at the scores"
            )
