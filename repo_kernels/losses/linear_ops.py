"""Operators of torch.library for the linear losses: what torch.compile sees of them, with their autograd.

A summed loss has one upstream gradient for all rows: its gradients are computed with the loss, and backward multiplies
them by that scalar, in place. For a loss per token and for log-probabilities, backward forms the logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..backends.interface import STATE, TOKENS, LossRows
from .autograd import refuse_second_order
from .linear import LinearHead, loss_chunks, scale_all, slope_chunks, statistics_chunks
from .stats import row_sum


def gradients_wanted(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    """Return which of hidden, weight and bias get a gradient."""
    recorded = torch.is_grad_enabled()
    return (
        recorded and hidden.requires_grad,
        recorded and weight.requires_grad,
        recorded and bias is not None and bias.requires_grad,
    )


def _precise(hidden: Tensor) -> torch.autocast:
    """Switch autocast off: gemm.py chooses the dtypes."""
    return torch.autocast(hidden.device.type, enabled=False)


def _reference(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, result: torch.dtype
) -> tuple[Tensor, LinearHead] | None:
    return None if hidden is None or weight is None else (hidden, LinearHead.of(hidden, weight, bias, result))


def _fake_gradients(
    hidden: Tensor, weight: Tensor, result: torch.dtype, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    grad_hidden, grad_weight, grad_bias = (
        hidden.new_empty(shape if want else (0,), dtype=result) for shape, want in zip(shapes, wanted, strict=True)
    )
    return grad_hidden, grad_weight, grad_bias


def _rounded(totals: Sequence[Tensor], dtypes: Sequence[torch.dtype | None]) -> tuple[Tensor | None, ...]:
    """Cast the sums to the dtypes of hidden, weight and bias; a dtype of None means that no gradient is wanted."""
    return tuple(None if dtype is None else total.to(dtype) for total, dtype in zip(totals, dtypes, strict=True))


def _keep_dtypes(ctx: Any, inputs: tuple, wanted: Sequence[bool]) -> None:
    ctx.wanted = list(wanted)
    ctx.dtypes = [x.dtype if want else None for x, want in zip(inputs[:3], wanted, strict=True)]
    ctx.set_materialize_grads(False)


@custom_op("repo_kernels::linear_loss", mutates_args=())
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ids: Tensor,
    values: Tensor,
    scalars: Tensor,
    code: int,
    softcap: float,
    entropy: int,
    wanted: Sequence[bool],
    per_token: bool,
    chunk_tokens: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute (loss, tokens (13, N), dL/dhidden, dL/dweight, dL/dbias); a gradient that is not wanted is empty.

    The loss is the sum (1,) or, with per_token, (N,), whose gradients backward computes. wanted: which of hidden,
    weight and bias get a gradient. ids to entropy are the fields of a `LossRows`.
    """
    result, rows = values.dtype, LossRows(ids, values, scalars, code, softcap, entropy)
    now = (False,) * 3 if per_token else wanted
    with _precise(hidden):
        head, reference = (
            LinearHead.of(hidden, weight, bias, result),
            _reference(ref_hidden, ref_weight, ref_bias, result),
        )
        losses, tokens, gradients = loss_chunks(hidden, head, reference, rows, now, None, chunk_tokens, backend)
    loss = losses if per_token else row_sum(losses)[None]
    return loss, tokens, *gradients.tensors


@linear_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    ids, values, wanted, per_token = rest[3], rest[4], rest[9], rest[10]
    now = (False,) * 3 if per_token else wanted
    loss, tokens = values.new_empty(ids.shape[0] if per_token else 1), values.new_empty(len(TOKENS), ids.shape[0])
    return loss, tokens, *_fake_gradients(hidden, weight, values.dtype, now)


def _keep_loss(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, code, softcap, entropy, wanted, per_token, chunk_tokens, backend = inputs
    _keep_dtypes(ctx, inputs, wanted)
    ctx.per_token, ctx.rest = per_token, (code, softcap, entropy, list(wanted), chunk_tokens, backend)
    ctx.save_for_backward(*(tensors if per_token else output[2:]))


def _loss_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:
    if upstream is None:
        return (None,) * 16
    backend, saved = ctx.rest[-1], ctx.saved_tensors
    traced = type(saved[-1] if not ctx.per_token else saved[6]) is not Tensor
    if not traced:
        refuse_second_order("linear_repo_loss")
    if ctx.per_token:
        code, softcap, entropy, wanted, chunk_tokens, backend = ctx.rest
        detached = [None if x is None else x.detach() for x in saved]
        totals = linear_loss_gradient(*detached, upstream, code, softcap, entropy, wanted, chunk_tokens, backend)
        return *_rounded(totals, ctx.dtypes), *(None,) * 13
    # a graph that is traced or retained may run backward again; otherwise nobody else reads the sums
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        totals = [total.detach() * upstream[0] for total in saved]
    else:
        totals = [total.detach() for total in saved]
        for total in totals:
            scale_all(total, upstream[0], backend)
            torch.autograd.graph.increment_version(total)
    return *_rounded(totals, ctx.dtypes), *(None,) * 13


linear_loss.register_autograd(_loss_backward, setup_context=_keep_loss)


@custom_op("repo_kernels::linear_loss_gradient", mutates_args=())
def linear_loss_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ids: Tensor,
    values: Tensor,
    scalars: Tensor,
    upstream: Tensor,
    code: int,
    softcap: float,
    entropy: int,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of hidden, weight and bias of losses (N,) with upstream (N,); empty if not wanted."""
    result, rows = values.dtype, LossRows(ids, values, scalars, code, softcap, entropy)
    with _precise(hidden):
        head, reference = (
            LinearHead.of(hidden, weight, bias, result),
            _reference(ref_hidden, ref_weight, ref_bias, result),
        )
        *_, gradients = loss_chunks(hidden, head, reference, rows, wanted, upstream, chunk_tokens, backend)
    return gradients.tensors


@linear_loss_gradient.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(hidden, weight, rest[4].dtype, rest[10])


@custom_op("repo_kernels::linear_statistics", mutates_args=())
def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scalars: Tensor,
    softcap: float,
    entropy: int,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
    backend: str,
) -> Tensor:
    """Compute the STATE (7, N); differentiable through its first two rows, logp and entropy."""
    with _precise(hidden):
        head = LinearHead.of(hidden, weight, bias, scalars.dtype)
        return statistics_chunks(hidden, head, ids, scalars, softcap, entropy, chunk_tokens, backend)


@linear_statistics.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scalars: Tensor, *_: Any) -> Tensor:
    return scalars.new_empty(len(STATE), ids.shape[0])


def _keep_statistics(ctx: Any, inputs: tuple, output: Tensor) -> None:
    hidden, weight, bias, ids, scalars, softcap, _, wanted, chunk_tokens, backend = inputs
    _keep_dtypes(ctx, inputs, wanted)
    ctx.rest = softcap, list(wanted), chunk_tokens, backend
    ctx.save_for_backward(hidden, weight, bias, ids, scalars, output)


def _statistics_backward(ctx: Any, upstream: Tensor | None) -> tuple:
    if upstream is None:
        return (None,) * 10
    hidden, weight, bias, ids, scalars, state = (None if x is None else x.detach() for x in ctx.saved_tensors)
    if type(state) is Tensor:  # not traced
        refuse_second_order("linear_selective_log_softmax")
    slopes = torch.cat((upstream[:2], torch.zeros_like(upstream[:1])))  # there is no full KL
    totals = linear_slopes_gradient(hidden, weight, bias, ids, scalars, state, slopes, *ctx.rest)
    return *_rounded(totals, ctx.dtypes), *(None,) * 7


linear_statistics.register_autograd(_statistics_backward, setup_context=_keep_statistics)


@custom_op("repo_kernels::linear_slopes_gradient", mutates_args=())
def linear_slopes_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scalars: Tensor,
    state: Tensor,
    slopes: Tensor,
    softcap: float,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of hidden, weight and bias from STATE (7, N) and SLOPES (3, N); empty if not wanted."""
    with _precise(hidden):
        head = LinearHead.of(hidden, weight, bias, scalars.dtype)
        gradients = slope_chunks(hidden, head, ids, state, slopes, scalars, softcap, wanted, chunk_tokens, backend)
    return gradients.tensors


@linear_slopes_gradient.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(hidden, weight, rest[1].dtype, rest[5])
