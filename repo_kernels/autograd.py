"""The autograd side of the losses: the gradient is computed with the loss, the backward only multiplies it.

Every optional per-token argument is in one LossArguments, so a backward returns a handful of values and not twenty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager
from .arguments import LossArguments


def _flat(result: eager.LossResult) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    return result.loss, result.logps, result.entropy, result.kl, result.stats.tensor


def _detach_all_but_loss(ctx: Any, flat: tuple) -> None:
    ctx.mark_non_differentiable(*(t for t in flat[1:] if t is not None))
    ctx.set_materialize_grads(False)


class LogitsLoss(torch.autograd.Function):
    """Gradient computed in the forward; the backward multiplies it by the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor | None, args: LossArguments) -> tuple:
        grad = None
        if ctx.needs_input_grad[0]:
            grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        flat = _flat(eager.repo_loss(args, logits, ref_logits, grad))
        _detach_all_but_loss(ctx, flat)
        ctx.save_for_backward(grad)
        return flat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:
        if upstream is None:
            return None, None, None
        (grad,) = ctx.saved_tensors
        return _scaled(grad, upstream), None, None


class InplaceLogitsLoss(torch.autograd.Function):
    """As LogitsLoss, with the gradient written over the logits: one buffer instead of two, and one backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, args: LossArguments, ref_logits: Tensor | None, buffer: Tensor) -> tuple:
        flat = _flat(eager.repo_loss(args, logits, ref_logits, buffer))
        _detach_all_but_loss(ctx, flat)
        ctx.buffer, ctx.version = buffer, buffer._version
        return flat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:
        if upstream is None:
            return None, None, None, None
        buffer, ctx.buffer = ctx.buffer, None
        if buffer is None:
            raise RuntimeError("repo_loss(inplace=True) was already differentiated: its gradient buffer is consumed")
        if buffer._version != ctx.version:
            raise RuntimeError(
                "repo_loss(inplace=True): the logits hold the gradient and were modified before backward"
            )
        buffer.copy_(_scaled(buffer, upstream))
        return buffer, None, None, None


def _scaled(grad: Tensor, upstream: Tensor) -> Tensor:
    """grad (..., V) times upstream (0-d or leading shape), rounded once to grad's dtype."""
    factor = upstream[..., None] if upstream.ndim else upstream
    return (grad.to(factor.dtype) * factor).to(grad.dtype)


class LinearLoss(torch.autograd.Function):
    """Gradients of hidden, weight and bias computed in the forward, except for "none", which waits for the upstream."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        args: LossArguments,
        reference: tuple[Tensor, eager.Head] | None,
        chunk_tokens: int | None,
    ) -> tuple:
        head = eager.make_head(weight, bias, args.dtype)
        wanted = ctx.needs_input_grad[:3]
        at_once = any(wanted) and args.loss_agg_mode != "none"
        gradients = eager.HeadGradients.zeros(hidden, head, wanted, args.dtype) if at_once else None
        ref_hidden, ref_head = reference or (None, None)
        flat = _flat(eager.linear_repo_loss(args, hidden, head, ref_hidden, ref_head, gradients, chunk_tokens))
        _detach_all_but_loss(ctx, flat)
        ctx.args, ctx.reference, ctx.chunk_tokens = args, reference, chunk_tokens
        if gradients is None:
            ctx.save_for_backward(hidden, weight, bias)
        else:
            ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
            ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return flat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:
        if upstream is None:
            return (None,) * 6
        if ctx.args.loss_agg_mode != "none":
            pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            # the upstream gradient, which may be a loss scale, is applied before the only rounding
            return (*(None if g is None else (g * upstream).to(dtype) for g, dtype in pairs), None, None, None)
        hidden, weight, bias = ctx.saved_tensors
        args: LossArguments = ctx.args
        head = eager.make_head(weight, bias, args.dtype)
        gradients = eager.HeadGradients.zeros(hidden, head, ctx.needs_input_grad[:3], args.dtype)
        row_upstream = upstream.reshape(-1)[args.layout.rows].to(args.dtype)
        ref_hidden, ref_head = ctx.reference or (None, None)
        eager.linear_repo_loss(args, hidden, head, ref_hidden, ref_head, gradients, ctx.chunk_tokens, row_upstream)
        return gradients.hidden, gradients.weight, gradients.bias, None, None, None
