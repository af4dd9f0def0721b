"""Descent: the optimiser steps of a run, which leave out gradients that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from repo_kernels.layers.bf16_linear import forget_copies

from ..common.errors import UserError
from ..config.schema import Config
from ..models.actor import Actor
from ..models.credit import Credit
from .optimizer import lr_at, make_optimizer


class Descent:
    """Takes optimiser steps on policy and critics, and owns their optimiser.

    actor: policy and critics. config: the configuration. credit: the head of algorithm.credit redistributed, else None.
    """

    def __init__(self, actor: Actor, config: Config, credit: Credit | None = None) -> None:
        self.actor, self.config, self.credit = actor, config, credit
        self.optimizer = make_optimizer(actor.policy, actor.critics, config)
        self.skipped_in_a_row, self.lr_scale = 0, 1.0

    def set_lr(self, step: int, steps: int) -> float:
        """Set the policy's learning rate to that of a step, times lr_scale, and return it. steps: of the whole run."""
        lr = lr_at(step, steps, self.config.optimizer) * self.lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr if group["policy"] else group["lr"]
        return lr

    def descend(self, losses: Mapping[str, float]) -> tuple[float, bool]:
        """Take one step with the gradients that have been added up, of all processes, clipped.

        losses: of the minibatch, by name, the same on every process.
        Returns the policy's gradient norm before clipping, and whether the step was taken: it is left out where a loss
        or a norm is not finite. Raises UserError after optimizer.max_skipped steps in a row that were left out.
        """
        if not self.actor.sharded:
            self.actor.world.sum_gradients(list(self.actor.parameters()))
        norm, critic_norm = (self._clip(module) for module in (self.actor.policy, self.actor.critics))
        taken = all(math.isfinite(x) for x in (norm, critic_norm, *losses.values()))
        if taken:
            self.optimizer.step()
            self.weights_changed()
            self.skipped_in_a_row = 0
        else:
            self._count_skip({**losses, "gradient norm": norm, "critics' gradient norm": critic_norm})
        self.optimizer.zero_grad(set_to_none=True)
        return norm, taken

    def weights_changed(self) -> None:
        """Forget copies made of the weights: optimisers of other packages, and checkpoints, write into .data."""
        forget_copies(self.actor.parameters())

    def _clip(self, module: nn.Module) -> float:
        trained = [p for p in module.parameters() if p.requires_grad]
        if not trained:
            return 0.0
        norm = torch.nn.utils.clip_grad_norm_(trained, self.config.optimizer.clip_norm)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def _count_skip(self, values: dict[str, float]) -> None:
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.config.optimizer.max_skipped:
            last = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
            raise UserError(
                f"{self.skipped_in_a_row} updates in a row had a non-finite loss or gradient (last: {last}) "
                "and were left out; lower optimizer.lr or critic.lr, or look at the scores"
            )
