"""Operators of torch.library over the backends: what torch.compile and others that look at operators see of the losses.

Each operator runs the backend named by its last argument. Its fake gives shapes, dtypes and strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..backends import choice
from ..backends.codes import NO_AGGREGATION, ROWS, STATE, STATS
from ..backends.interface import Loss, RowArguments, compute_dtype
from ..backends.memory_layout import gradient_buffer
from ..tensor_kinds import kept, written
from .autograd import is_batched, refuse_second_order, scaled_by_any


@custom_op("repo_kernels::fused_loss", mutates_args=())
def fused_loss(
    logits: Tensor,
    ref_logits: Tensor | None,
    arguments: Sequence[Tensor | None],
    scalars: Tensor,
    code: int,
    softcap: float,
    entropy: int,
    want_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute (loss, ROWS (5, N), STATS (18,), flags (N,), dL/dlogits times grad_scale).

    The loss is 0-d, or (N,) without aggregation. The gradient is empty without want_grad. arguments: the fields of
    `RowArguments`; they and the next four are the fields of a `Loss`.
    """
    kernels, loss = choice.load(backend), Loss(RowArguments.of(arguments), scalars, code, softcap, entropy)
    grad, zeroed = kernels.new_gradient(logits, loss.arguments) if want_grad else (None, False)
    value, stats, results = kernels.whole(logits, ref_logits, loss, grad, zeroed)
    value = results.rows[0].clone() if loss.per_token else value
    return value, results.rows, stats, results.flags, logits.new_empty(0) if grad is None else grad


@fused_loss.register_fake
def _(
    logits: Tensor,
    ref_logits: Tensor | None,
    arguments: Sequence[Tensor | None],
    scalars: Tensor,
    code: int,
    softcap: float,
    entropy: int,
    want_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = gradient_buffer(logits) if want_grad else logits.new_empty(0)
    return *fake_loss(logits, code), grad


def fake_loss(source: Tensor, code: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tensors like the loss, ROWS, STATS and flags for logits or hidden states like `source`."""
    count, dtype = math.prod(source.shape[:-1]), compute_dtype(source)  # Size.numel() would fix a dynamic length
    shape = (count,) if code >> 8 & 7 == NO_AGGREGATION else ()
    rows, stats = source.new_empty(len(ROWS), count, dtype=dtype), source.new_empty(len(STATS), dtype=dtype)
    return source.new_empty(shape, dtype=dtype), rows, stats, source.new_empty(count, dtype=torch.int32)


def _keep_gradient(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *_, flags, grad = output
    ctx.save_for_backward(grad, flags)
    ctx.backend = inputs[-1]
    ctx.set_materialize_grads(False)


def _scale_gradient(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:
    nothing = (None,) * 8
    if upstream is None:
        return None, *nothing
    grad, flags = ctx.saved_tensors
    if type(grad) is Tensor:  # not traced
        refuse_second_order("repo_loss")
    grad = grad.detach()
    if is_batched(upstream):
        return scaled_by_any(grad, upstream, flags), *nothing
    # a copy: the gradient is a result of the operator, which its caller may still hold
    return scaled_rows(grad, written(upstream), flags, ctx.backend), *nothing


fused_loss.register_autograd(_scale_gradient, setup_context=_keep_gradient)


@custom_op("repo_kernels::scaled_rows", mutates_args=())
def scaled_rows(grad: Tensor, upstream: Tensor, flags: Tensor, backend: str) -> Tensor:
    """Return a copy of grad (T, V) or (B, L, V) whose live rows are multiplied by upstream, 0-d or (N,)."""
    out = gradient_buffer(grad).copy_(grad)
    choice.load(backend).scale_rows(out, upstream, flags)
    return out


@scaled_rows.register_fake
def _(grad: Tensor, upstream: Tensor, flags: Tensor, backend: str) -> Tensor:
    return gradient_buffer(grad)


@custom_op("repo_kernels::row_statistics", mutates_args=())
def row_statistics(
    logits: Tensor, ids: Tensor, temperature: Tensor, softcap: float, entropy: int, backend: str
) -> Tensor:
    """Compute the STATE (7, N); differentiable in the logits through its first two rows, logp and entropy.

    temperature: 0-d or (N,), compute dtype, here and in `row_gradient`.
    """
    return choice.load(backend).statistics(logits, ids, temperature, softcap, entropy)


@row_statistics.register_fake
def _(logits: Tensor, ids: Tensor, temperature: Tensor, softcap: float, entropy: int, backend: str) -> Tensor:
    return temperature.new_empty(len(STATE), ids.shape[0])


def _keep_logits(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, ids, temperature, ctx.softcap, _, ctx.backend = inputs
    ctx.save_for_backward(logits, kept(ids), kept(temperature), output)
    ctx.set_materialize_grads(False)


def _apply_slopes(ctx: Any, upstream: Tensor | None) -> tuple:
    if upstream is None:
        return (None,) * 6
    logits, ids, temperature, state = ctx.saved_tensors
    if type(state) is Tensor:  # not traced; the logits cannot tell, since they may be a Parameter
        refuse_second_order("selective_log_softmax")
    slopes = torch.cat((upstream[:2], torch.zeros_like(upstream[:1])))  # there is no full KL
    grad = row_gradient(logits.detach(), ids, state.detach(), slopes, temperature, ctx.softcap, ctx.backend)
    return grad, None, None, None, None, None


row_statistics.register_autograd(_apply_slopes, setup_context=_keep_logits)


@custom_op("repo_kernels::row_gradient", mutates_args=())
def row_gradient(
    logits: Tensor, ids: Tensor, state: Tensor, slopes: Tensor, temperature: Tensor, softcap: float, backend: str
) -> Tensor:
    """Compute dL/dlogits from the STATE (7, N) and the SLOPES (3, N)."""
    kernels = choice.load(backend)
    grad, _ = kernels.new_gradient(logits, None)
    kernels.apply(logits, ids, state, slopes, temperature, softcap, grad)
    return grad


@row_gradient.register_fake
def _(
    logits: Tensor, ids: Tensor, state: Tensor, slopes: Tensor, temperature: Tensor, softcap: float, backend: str
) -> Tensor:
    return gradient_buffer(logits)
