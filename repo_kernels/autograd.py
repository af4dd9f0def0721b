"""The in-place form of the loss: the gradient is written over the logits, one buffer instead of two, one backward.

A custom operator that mutates its input cannot register autograd, so this is an autograd.Function of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
from .rows import LossRows


class InplaceLoss(torch.autograd.Function):
    """(losses (N,), tokens (13, N)); `buffer` is the detached logits, which share their memory and version counter."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor | None, rows: LossRows, buffer: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        losses, tokens = backends.load(backend).fused(buffer, ref_logits, rows, buffer)
        torch.autograd.graph.increment_version(buffer)
        ctx.mark_non_differentiable(tokens)
        ctx.set_materialize_grads(False)
        ctx.buffer, ctx.version, ctx.backend = buffer, buffer._version, backend
        return losses, tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple:
        nothing = (None,) * 4
        if upstream is None:
            return None, *nothing
        buffer, ctx.buffer = ctx.buffer, None
        if buffer is None:
            raise RuntimeError("repo_loss(inplace=True) was already differentiated: its gradient buffer is consumed")
        if buffer._version != ctx.version:
            raise RuntimeError(
                "repo_loss(inplace=True): the logits hold the gradient and were modified before backward"
            )
        backends.load(ctx.backend).scale_rows(buffer, upstream)
        torch.autograd.graph.increment_version(buffer)
        return buffer, *nothing
