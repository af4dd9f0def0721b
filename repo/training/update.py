"""Update: run the optimiser steps on one rollout batch."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repo_kernels import LossStats

from ..common.seeds import generator
from ..config.schema import Config
from ..data.prompts import Example, batch_at
from ..data.sequences import Sequences
from ..models.actor import Actor, Predictions, predict
from ..models.credit import Credit, TokenStates
from ..models.sharding import require_finite_weights
from ..scoring.embedded import Reading
from .accumulation import Accumulator
from .advantages import penalised_cost
from .batch import Batch
from .descent import Descent


@dataclass(frozen=True)
class UpdateResult:
    """Result of one update.

    losses: by name, mean over the optimiser steps.
    grad_norm: gradient norm of the policy in the last optimiser step, before clipping.
    lr: learning rate of the policy.
    skipped: optimiser steps left out because a loss or gradient was not finite.
    stats: statistics of the policy loss, merged over the optimiser steps.
    logps: (B, R) fp32 log-probabilities of the response tokens in nats, which the trainer computed with the weights
        that sampled them.
    """

    losses: dict[str, float]
    grad_norm: float
    lr: float
    skipped: int
    stats: LossStats
    logps: Tensor


class Updater(Descent):
    """Updates policy and critics from rollout batches.

    actor: policy and critics. config: the configuration. examples: supervised examples of ptx, if any. credit: head of
    algorithm.credit redistributed.
    """

    def __init__(
        self, actor: Actor, config: Config, examples: Sequence[Example] = (), credit: Credit | None = None
    ) -> None:
        super().__init__(actor, config, credit)
        self.examples, self.accumulator = examples, Accumulator(actor, config)

    @property
    def steps_per_update(self) -> int:
        """Return the number of optimiser steps per rollout batch.

        With more than 1 the ratio needs log-probabilities of the sampling policy.
        """
        return self.config.optimizer.epochs * self.config.optimizer.minibatches

    def predict(self, sequences: Sequences, step: int) -> Predictions:
        """Compute the log-probabilities and critics' values that this update needs, with the weights that sampled.

        If only the ratio needs log-probabilities, the rows of the first minibatch are left 0: their ratio is 1 in the
        first pass, and that pass fills them in for later epochs. With a single optimiser step nothing is computed.
        """
        config, rows = self.config, None
        if not self._needs_values:
            if self.steps_per_update == 1:
                return Predictions(None, {})
            first = next(self._minibatches(len(sequences.group), step))[0]
            rows = torch.ones(len(sequences.group), dtype=torch.bool).index_fill(0, first, False).nonzero().squeeze(1)
        with self.actor.lm.copies():
            return predict(self.actor, sequences, config.rollout.temperature, config.optimizer.budget, rows)

    def share_and_learn(
        self, reading: Reading | None, rows: range, sequences: Sequences, costs: Tensor, limit: float
    ) -> Tensor | None:
        """Return the share of the penalised cost of each token, (B, R), and then learn from it; None without credit.

        What this batch teaches changes the shares of the next: shares that knew the cost would bias the gradient.

        reading: states of this process's responses. rows: their places in the batch. costs: (B,) C. limit: d of the
        step.
        """
        if self.credit is None:
            return None
        assert reading is not None
        mask, penalised = sequences.response_mask, penalised_cost(self.config.algorithm, costs, limit)
        tokens = TokenStates(reading, rows, mask)
        shares = self.credit.shares(tokens)
        self.credit.fit(tokens, penalised)
        return shares

    @property
    def _needs_values(self) -> bool:
        """Tell whether the advantages need log-probabilities or values of every token."""
        return len(self.actor.critics) > 0 or self.config.algorithm.kl_placement != "loss"

    def update(self, batch: Batch, step: int, steps: int) -> UpdateResult:
        """Run epochs x shuffled minibatches x micro-batches, with supervised examples in the same optimiser steps.

        step: step of the run, counted from 0. steps: steps of the whole run.

        Raises UserError after optimizer.max_skipped minibatches in a row with a non-finite loss or gradient, or if a
        weight is not finite after the update.
        """
        lr = self.set_lr(step, steps)
        losses, stats, skipped, norm = defaultdict[str, list[float]](list), [], 0, 0.0
        old = torch.zeros_like(batch.ref_logps) if batch.old_logps is None else batch.old_logps.clone()
        for index, (rows, examples) in enumerate(self._minibatches(len(batch.costs), step)):
            # until the first optimiser step the policy is the one that sampled: the ratio is 1, but has a gradient
            known = dataclasses.replace(batch, old_logps=old if index else None)
            with self.actor.lm.copies():
                minibatch, minibatch_stats = self.accumulator.backward(known, rows, None if index else old)
                if examples:
                    minibatch["ptx_loss"] = self.accumulator.supervised_backward(examples)
            norm, taken = self.descend(minibatch)
            skipped += not taken
            stats.append(minibatch_stats)
            for name, value in minibatch.items():
                losses[name].append(value)
        require_finite_weights(self.actor, self.actor.world, f"after step {step}")
        means = {name: sum(values) / len(values) for name, values in losses.items()}
        return UpdateResult(means, norm, lr, skipped, stats[0].merge(*stats[1:]), old)

    def _minibatches(self, count: int, step: int) -> Iterator[tuple[Tensor, list[Example]]]:
        """Yield the rows of each minibatch of each epoch, with as many supervised examples if there are any."""
        seed, optimizer = self.config.seed, self.config.optimizer
        for epoch in range(optimizer.epochs):
            order = torch.randperm(count, generator=generator(seed, "minibatches", step, epoch))
            index = step * optimizer.epochs + epoch
            examples = batch_at(self.examples, index, count, seed, "ptx") if self.examples else []
            for part in torch.arange(count).tensor_split(optimizer.minibatches):
                yield order[part], [examples[i] for i in part.tolist() if examples]
