"""Operators of torch.library over the backends: what torch.compile sees of the losses, with their autograd.

The gradient of the logits is computed with the loss; backward only multiplies its rows by the upstream gradient. Each
operator runs the backend named by its last argument. Its fake gives shapes, dtypes and strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..backends import choice
from ..backends.interface import STATE, TOKENS, LossRows, gradient_buffer
from .autograd import live_upstream, refuse_second_order


@custom_op("repo_kernels::fused_loss", mutates_args=())
def fused_loss(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor,
    values: Tensor,
    scalars: Tensor,
    code: int,
    softcap: float,
    entropy: int,
    want_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (losses (N,), tokens (13, N), dL/dlogits times grad_scale); the last is empty without want_grad.

    ids, values, scalars, code, softcap and entropy are the fields of a `LossRows`.
    """
    kernels, rows = choice.load(backend), LossRows(ids, values, scalars, code, softcap, entropy)
    grad, zeroed = kernels.new_gradient(logits, ids) if want_grad else (None, False)
    losses, tokens = kernels.fused(logits, ref_logits, rows, grad, zeroed)
    return losses, tokens, logits.new_empty(0) if grad is None else grad


@fused_loss.register_fake
def _(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor,
    values: Tensor,
    scalars: Tensor,
    code: int,
    softcap: float,
    entropy: int,
    want_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    losses, tokens = values.new_empty(ids.shape[0]), values.new_empty(len(TOKENS), ids.shape[0])
    return losses, tokens, gradient_buffer(logits) if want_grad else logits.new_empty(0)


def _keep_gradient(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2], inputs[2])
    ctx.backend = inputs[-1]
    ctx.set_materialize_grads(False)


def _scale_gradient(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:
    nothing = (None,) * 9
    if upstream is None:
        return None, *nothing
    grad, ids = ctx.saved_tensors
    traced = type(grad) is not Tensor
    if not traced:
        refuse_second_order("repo_loss")
    grad, upstream = grad.detach(), live_upstream(upstream, ids)
    # a graph that is traced or retained may run backward again; otherwise nobody else reads the buffer
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return scaled_rows(grad, upstream, ctx.backend), *nothing
    choice.load(ctx.backend).scale_rows(grad, upstream)
    torch.autograd.graph.increment_version(grad)
    return grad, *nothing


fused_loss.register_autograd(_scale_gradient, setup_context=_keep_gradient)


@custom_op("repo_kernels::scaled_rows", mutates_args=())
def scaled_rows(grad: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """Return a copy of grad (T, V) or (B, L, V) whose rows are multiplied by upstream (N,)."""
    out = gradient_buffer(grad).copy_(grad)
    choice.load(backend).scale_rows(out, upstream)
    return out


@scaled_rows.register_fake
def _(grad: Tensor, upstream: Tensor, backend: str) -> Tensor:
    return gradient_buffer(grad)


@custom_op("repo_kernels::row_statistics", mutates_args=())
def row_statistics(logits: Tensor, ids: Tensor, scalars: Tensor, softcap: float, entropy: int, backend: str) -> Tensor:
    """Compute the STATE (7, N); differentiable in the logits through its first two rows, logp and entropy."""
    return choice.load(backend).statistics(logits, None, ids, scalars, softcap, entropy)


@row_statistics.register_fake
def _(logits: Tensor, ids: Tensor, scalars: Tensor, softcap: float, entropy: int, backend: str) -> Tensor:
    return scalars.new_empty(len(STATE), ids.shape[0])


def _keep_logits(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, ids, scalars, ctx.softcap, _, ctx.backend = inputs
    ctx.save_for_backward(logits, ids, scalars, output)
    ctx.set_materialize_grads(False)


def _apply_slopes(ctx: Any, upstream: Tensor | None) -> tuple:
    if upstream is None:
        return (None,) * 6
    logits, ids, scalars, state = ctx.saved_tensors
    if type(state) is Tensor:  # not traced; the logits cannot tell, since they may be a Parameter
        refuse_second_order("selective_log_softmax")
    slopes = torch.cat((upstream[:2], torch.zeros_like(upstream[:1])))  # there is no full KL
    grad = row_gradient(logits.detach(), ids, state.detach(), slopes, scalars, ctx.softcap, ctx.backend)
    return grad, None, None, None, None, None


row_statistics.register_autograd(_apply_slopes, setup_context=_keep_logits)


@custom_op("repo_kernels::row_gradient", mutates_args=())
def row_gradient(
    logits: Tensor, ids: Tensor, state: Tensor, slopes: Tensor, scalars: Tensor, softcap: float, backend: str
) -> Tensor:
    """Compute dL/dlogits from the STATE (7, N) and the SLOPES (3, N)."""
    kernels = choice.load(backend)
    grad, zeroed = kernels.new_gradient(logits, ids)
    kernels.apply(logits, None, ids, state, slopes, scalars, softcap, grad, zeroed)
    return grad


@row_gradient.register_fake
def _(
    logits: Tensor, ids: Tensor, state: Tensor, slopes: Tensor, scalars: Tensor, softcap: float, backend: str
) -> Tensor:
    return gradient_buffer(logits)
