"""Pairs: update the policy on pairs of responses that are not its own, by constrained DPO or its rectified form.

The gradient is that of `repo_kernels.pairs.pair_loss`. Both responses of a pair are read in one forward pass, in which
they share their prompt where the model reads packed rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from repo_kernels.pairs import pair_loss, penalised_rewards, soft_labels

from ..common.errors import UserError
from ..common.seeds import generator
from ..config.schema import AlgorithmConfig, Config
from ..data.packing import Packed, flat
from ..data.sequences import Sequences
from ..models.actor import Actor
from ..models.hidden_states import States
from ..models.layout import Attention
from ..models.sharding import require_finite_weights
from ..scoring.scorers import Scores
from .descent import Descent


def require_pairs_in_one_pass(attention: Attention, path: str) -> None:
    """Raise UserError if the model at `path` reads one response at a time, so that no pass holds a pair."""
    if not (attention.packs or attention.pads):
        raise UserError(
            f"algorithm.method must be one that learns from the policy's own responses with model.path {path!r}, which "
            "reads one response at a time: cdpo and repo_dpo need both of a pair in one pass"
        )


@dataclass(frozen=True)
class PairBatch:
    """P pairs: rows 2i and 2i + 1 of the sequences are the responses of pair i.

    sequences: tokens of prompts and responses. labels: (P,) fp32, the probability that the first response is the better
    one. ref_logps: (2P, R) fp32, the reference's log-probabilities of the response tokens in nats. lam: weight lambda
    of the cost.
    """

    sequences: Sequences
    labels: Tensor
    ref_logps: Tensor
    lam: float


def make_pair_batch(
    algorithm: AlgorithmConfig, sequences: Sequences, scores: Scores, ref_logps: Tensor, lam: float
) -> PairBatch:
    """Label P pairs by their penalised rewards. scores: of 2P responses; the rest as in PairBatch."""
    mode = "rectified" if algorithm.method == "repo_dpo" else "lagrangian"
    utilities = penalised_rewards(scores.rewards, scores.costs, lam, algorithm.cost_limit, mode)
    return PairBatch(sequences, soft_labels(utilities.view(-1, 2)), ref_logps, lam)


@dataclass(frozen=True)
class PairTargets:
    """Targets of the m pairs of one micro-batch with N response tokens, on the policy's device.

    responses: (m, 2) int64, both responses of each pair, as indices into the responses of the pass.
    labels: (m,) fp32. ref_logps: (N,) fp32 in nats. divisor: pairs of the whole minibatch.
    """

    responses: Tensor
    labels: Tensor
    ref_logps: Tensor
    divisor: int


def pairs_in(packed: Packed) -> tuple[Tensor, Tensor]:
    """Find the pairs of a pass: their numbers in the batch (m,), and their two responses in the pass (m, 2).

    Both are int64 on the CPU. A pass without tokens has none.
    """
    rows, places = packed.order.sort()
    rows, places = (x if any(packed.lengths) else x[:0] for x in (rows, places))
    return rows[::2] // 2, places.view(-1, 2)


class PairLoss(nn.Module):
    """The loss of the pairs of one micro-batch."""

    def __init__(self, temperature: float, beta: float) -> None:
        """temperature: divides the logits. beta: weight of the KL to the reference."""
        super().__init__()
        self.temperature, self.beta = temperature, beta

    def forward(self, states: States, _: nn.ModuleDict, targets: PairTargets) -> tuple[Tensor, Tensor]:
        """Compute the sum of the losses over `divisor` (0-d), and the log-ratios (m, 2) of the pairs in nats."""
        by_token = states.logps(self.temperature) - targets.ref_logps
        by_response = torch.stack([part.sum() for part in by_token.split(states.packed.lengths)])
        ratios = by_response[targets.responses]
        return pair_loss(ratios, targets.labels, self.beta).losses.sum() / targets.divisor, ratios.detach().clone()


class PairResult(NamedTuple):
    """Result of one update.

    loss: mean over the optimiser steps, in nats per pair.
    grad_norm: gradient norm of the policy in the last optimiser step, before clipping.
    lr: learning rate of the policy.
    skipped: optimiser steps left out because a loss or gradient was not finite.
    log_ratios: (P, 2) fp32, log pi - log pi_ref of both responses of each pair in nats, with the weights that the pair
        met in the first epoch.
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: int
    log_ratios: Tensor


class PairUpdater(Descent):
    """Updates the policy from batches of pairs. actor, config: as for Descent."""

    def __init__(self, actor: Actor, config: Config) -> None:
        super().__init__(actor, config)
        self.loss = PairLoss(config.rollout.temperature, config.algorithm.beta)

    def update(self, batch: PairBatch, step: int, steps: int) -> PairResult:
        """Run epochs x shuffled minibatches x micro-batches.

        step: step of the run, counted from 0. steps: steps of the whole run. Raises UserError as `descend` does, or if
        a weight is not finite after the update.
        """
        lr, losses, skipped, norm = self.set_lr(step, steps), list[float](), 0, 0.0
        log_ratios = torch.zeros(len(batch.labels), 2)
        for index, pairs in enumerate(self._minibatches(len(batch.labels), step)):
            with self.actor.lm.copies():
                loss, ratios = self.backward(batch, pairs)
            if index < self.config.optimizer.minibatches:
                log_ratios[pairs] = ratios[pairs]
            norm, taken = self.descend({"loss": loss})
            skipped += not taken
            losses.append(loss)
        require_finite_weights(self.actor, self.actor.world, f"after step {step}")
        return PairResult(sum(losses) / len(losses), norm, lr, skipped, log_ratios)

    def backward(self, batch: PairBatch, pairs: Tensor) -> tuple[float, Tensor]:
        """Add the gradient of a minibatch, and return its mean loss and the log-ratios (P, 2), 0 for other pairs.

        pairs: (n,) int64, the numbers of the minibatch's pairs.
        """
        rows = torch.stack((2 * pairs, 2 * pairs + 1), 1).flatten()
        device, passes, losses = self.actor.lm.device, list[tuple[Tensor, Tensor]](), list[Tensor]()
        with self.actor.lm.recomputing():
            for packed in self.actor.own_parts(batch.sequences, rows, self.config.optimizer.budget, whole=True):
                part, (numbers, responses) = packed.to(device), pairs_in(packed)
                labels, ref_logps = batch.labels[numbers].to(device), flat(part, batch.ref_logps)
                targets = PairTargets(responses.to(device), labels, ref_logps, len(pairs))
                loss, ratios = self.actor(part, self.loss, targets)
                loss.backward()
                losses.append(loss.detach())
                passes.append((numbers, ratios))
        found = torch.zeros(len(batch.labels), 2)
        for numbers, ratios in passes:  # not in the passes: each would wait for a GPU
            found[numbers] = ratios.float().cpu()
        everyone = self.actor.world.gather((torch.stack(losses).sum().item(), found))
        return sum(loss for loss, _ in everyone), torch.stack([ratios for _, ratios in everyone]).sum(0)

    def _minibatches(self, count: int, step: int) -> Iterator[Tensor]:
        """Yield the numbers of the pairs of each minibatch of each epoch."""
        optimizer = self.config.optimizer
        for epoch in range(optimizer.epochs):
            order = torch.randperm(count, generator=generator(self.config.seed, "minibatches", step, epoch))
            yield from order.tensor_split(optimizer.minibatches)
