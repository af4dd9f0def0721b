"""Gradient accumulation: compute the gradient of a minibatch one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repo_kernels import LossStats

from ..config.schema import Config
from ..data.packing import Packed, unflat
from ..data.prompts import Example
from ..data.sequences import make_sequences
from ..models.actor import Actor
from ..models.lm_head import lm_head
from .batch import Batch
from .loss import MicroBatchLoss, PolicyLoss, SupervisedLoss, make_targets


class Accumulator:
    """Adds up the gradients of policy and critics over the micro-batches of a minibatch.

    actor: policy and critics. config: algorithm, sampling temperature, micro-batch size and ptx.coef are read from it.
    """

    def __init__(self, actor: Actor, config: Config) -> None:
        self.actor, self.algorithm, self.budget = actor, config.algorithm, config.optimizer.budget
        softcap = lm_head(actor.policy).softcap
        self.policy_loss = PolicyLoss(config.algorithm, config.rollout.temperature, softcap)
        self.supervised_loss, self.ptx_coef = SupervisedLoss(), config.ptx.coef

    def backward(self, batch: Batch, rows: Tensor, logps: Tensor | None = None) -> tuple[dict[str, float], LossStats]:
        """Add the gradient of a minibatch and return its losses by name and the policy's statistics.

        rows: (n,) int64 indices of the minibatch's responses in the batch.
        logps: (B, R) fp32, filled with the log-probabilities of the minibatch's response tokens; None to skip.
        """
        lengths = batch.sequences.response_lengths[rows]
        tokens, sequences = max(1, int(lengths.sum())), max(1, int((lengths > 0).sum()))
        divisor = tokens if self.algorithm.loss_agg_mode == "token-mean" else sequences
        passes, results = list[Packed](), list[MicroBatchLoss]()
        seen = torch.zeros(batch.ref_logps.shape)
        with self.actor.lm.recomputing():
            for packed in self.actor.own_parts(batch.sequences, rows, self.budget):
                part = packed.to(self.actor.lm.device)
                targets = make_targets(batch, part, self.algorithm, divisor, tokens)
                result = self.actor(part, self.policy_loss, targets)
                torch.stack(list(result.losses.values())).sum().backward()
                results.append(result._replace(losses={name: x.detach() for name, x in result.losses.items()}))
                passes.append(packed)
        for packed, result in zip(passes, results, strict=True):  # not in the passes: each would wait for a GPU
            unflat(packed, result.logps, seen)
        own = {name: torch.stack([r.losses[name] for r in results]).sum().item() for name in results[0].losses}
        stats = LossStats(results[0].stats.merge(*(r.stats for r in results[1:])).tensor.cpu())
        everyone = self.actor.world.gather((own, stats, seen[rows]))
        if logps is not None:
            logps[rows] = torch.stack([part for _, _, part in everyone]).sum(0)
        losses = {name: sum(each[name] for each, _, _ in everyone) for name in own}
        return losses, everyone[0][1].merge(*(each for _, each, _ in everyone[1:]))

    def supervised_backward(self, examples: Sequence[Example]) -> float:
        """Add the gradient of ptx.coef x mean cross-entropy and return that mean, in nats per response token."""
        pad_id, device = self.actor.lm.pad_id, self.actor.lm.device
        sequences = make_sequences([e.prompt_ids for e in examples], [e.response_ids for e in examples], pad_id)
        tokens, total = int(sequences.response_lengths.sum()), torch.zeros((), device=device)
        with self.actor.lm.recomputing():
            for packed in self.actor.own_parts(sequences, torch.arange(len(examples)), self.budget):
                loss = self.actor(packed.to(device), self.supervised_loss, tokens)
                (self.ptx_coef * loss).backward()
                total += loss.detach()
        return sum(self.actor.world.gather(total.item()))
