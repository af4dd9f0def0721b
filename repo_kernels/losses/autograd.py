"""Rules that every backward of the losses follows, and the in-place loss: one buffer instead of two, one backward.

The in-place loss is an autograd.Function, because a custom operator that mutates its input cannot register autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choice
from ..backends.interface import IGNORED, LossRows


def refuse_second_order(name: str) -> None:
    """Raise RuntimeError in a backward that autograd records (create_graph=True).

    Its result would enter the graph as a constant, and a second backward would give a wrong gradient.

    name: the function that the message names.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} can be differentiated once: create_graph=True is not supported")


def live_upstream(upstream: Tensor, ids: Tensor) -> Tensor:
    """Return upstream (N,) with 1 on dead rows: their gradient is 0 already and need not be touched."""
    return torch.where(ids == IGNORED, 1.0, upstream)


class InplaceLoss(torch.autograd.Function):
    """Compute (losses (N,), tokens (13, N)) and write the gradient over the logits.

    `buffer` is the detached logits, which share memory and version counter with them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor | None, rows: LossRows, buffer: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        losses, tokens = choice.load(backend).fused(buffer, ref_logits, rows, buffer)
        torch.autograd.graph.increment_version(buffer)
        ctx.mark_non_differentiable(tokens)
        ctx.set_materialize_grads(False)
        ctx.buffer, ctx.version, ctx.backend, ctx.ids = buffer, buffer._version, backend, rows.ids
        return losses, tokens

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple:
        refuse_second_order("repo_loss")
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
        choice.load(ctx.backend).scale_rows(buffer, live_upstream(upstream, ctx.ids))
        torch.autograd.graph.increment_version(buffer)
        return buffer, *nothing
