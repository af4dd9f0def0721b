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

from ...backends import choice
from ...backends.codes import STATE
from ...backends.interface import Loss, RowArguments
from ...tensor_kinds import kept, written
from ..autograd import held_by_a_caller, is_batched, may_run_again, refuse_second_order
from ..ops import fake_loss
from .chunks import Budget
from .linear import LinearHead, loss_chunks, scale_all, slope_chunks, statistics_chunks
from .lora import LEAVES, HeadTensors

# The first LEAVES arguments of each operator are those of HeadTensors that may get a gradient.
HEADS = 9  # the tensors of HeadTensors, and hidden states, weight and bias of a reference
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def gradients_wanted(tensors: HeadTensors) -> list[bool]:
    """Return which of the leaves get a gradient."""
    recorded = torch.is_grad_enabled()
    return [recorded and x is not None and x.requires_grad for x in tensors[:LEAVES]]


def precise(hidden: Tensor) -> torch.autocast:
    """Switch autocast off: gemm.py chooses the dtypes."""
    return torch.autocast(hidden.device.type, enabled=False)


def _reference(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, result: torch.dtype
) -> tuple[Tensor, LinearHead] | None:
    return None if hidden is None or weight is None else (hidden, LinearHead.of(hidden, weight, bias, result=result))


def fake_gradients(leaves: Sequence[Tensor | None], result: torch.dtype, wanted: Sequence[bool]) -> list[Tensor]:
    like = next(x for x in leaves if x is not None)
    return [
        like.new_empty((0,) if x is None or not want else x.shape, dtype=result)
        for x, want in zip(leaves, wanted, strict=True)
    ]


def rounded(totals: Sequence[Tensor], dtypes: Sequence[torch.dtype | None]) -> tuple[Tensor | None, ...]:
    """Cast the sums to the dtypes of the leaves; a dtype of None means that no gradient is wanted."""
    return tuple(None if dtype is None else total.to(dtype) for total, dtype in zip(totals, dtypes, strict=True))


def keep_dtypes(ctx: Any, inputs: tuple, wanted: Sequence[bool]) -> None:
    ctx.wanted = list(wanted)
    ctx.dtypes = [x.dtype if want else None for x, want in zip(inputs[:LEAVES], wanted, strict=True)]
    ctx.set_materialize_grads(False)


@custom_op("repo_kernels::linear_loss", mutates_args=())
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    arguments: Sequence[Tensor | None],
    scalars: Tensor,
    code: int,
    softcap: float,
    entropy: int,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
    chunk_bytes: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute (loss, ROWS (5, N), STATS (18,), the gradients of the leaves); an unwanted gradient is empty.

    The loss is 0-d or, without aggregation, (N,), whose gradients backward computes. wanted: which leaves get a
    gradient. arguments to entropy are the fields of a `Loss`.
    """
    loss, result = Loss(RowArguments.of(arguments), scalars, code, softcap, entropy), scalars.dtype
    now, budget = (False,) * LEAVES if loss.per_token else wanted, Budget(hidden.device.type, chunk_tokens, chunk_bytes)
    with precise(hidden):
        head = LinearHead.of(hidden, weight, bias, lora_a, lora_b, scaling, result=result)
        reference = _reference(ref_hidden, ref_weight, ref_bias, result)
        value, stats, results, gradients = loss_chunks(hidden, head, reference, loss, now, None, budget, backend)
    value = results.rows[0].clone() if loss.per_token else value
    return value, results.rows, stats, *gradients.tensors


@linear_loss.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    scalars, code, wanted = rest[HEADS], rest[HEADS + 1], rest[HEADS + 4]
    value, rows, stats, _ = fake_loss(hidden, code)
    now = (False,) * LEAVES if value.ndim else wanted
    return value, rows, stats, *fake_gradients((hidden, *rest[: LEAVES - 1]), scalars.dtype, now)


def _keep_loss(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *heads, arguments, scalars, code, softcap, entropy, wanted, chunk_tokens, chunk_bytes, backend = inputs
    keep_dtypes(ctx, inputs, wanted)
    ctx.per_token = bool(output[0].ndim)
    ctx.rest = (code, softcap, entropy, list(wanted), chunk_tokens, chunk_bytes, backend)
    ctx.save_for_backward(*(map(kept, (*heads, scalars, *arguments)) if ctx.per_token else output[3:]))


def _loss_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:
    nothing = (None,) * 13
    if upstream is None:
        return (None,) * LEAVES + nothing
    backend, saved = ctx.rest[-1], ctx.saved_tensors
    traced = type(saved[HEADS] if ctx.per_token else saved[-1]) is not Tensor
    if not traced:
        refuse_second_order("linear_repo_loss")
    if ctx.per_token:
        *heads, scalars = (None if x is None else x.detach() for x in saved[: HEADS + 1])
        totals = linear_loss_gradient(*heads, list(saved[HEADS + 1 :]), scalars, upstream, *ctx.rest)
        return *rounded(totals, ctx.dtypes), *nothing
    # a graph that is traced or retained may run backward again, and a caller of the operator may hold the sums
    if traced or may_run_again() or is_batched(upstream) or any(map(held_by_a_caller, saved)):
        totals = [total.detach() * upstream for total in saved]
    else:
        totals = [total.detach() for total in saved]
        for total in totals:
            scale_all(total, written(upstream), backend)
            torch.autograd.graph.increment_version(total)
    return *rounded(totals, ctx.dtypes), *nothing


linear_loss.register_autograd(_loss_backward, setup_context=_keep_loss)


@custom_op("repo_kernels::linear_loss_gradient", mutates_args=())
def linear_loss_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    arguments: Sequence[Tensor | None],
    scalars: Tensor,
    upstream: Tensor,
    code: int,
    softcap: float,
    entropy: int,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
    chunk_bytes: int | None,
    backend: str,
) -> Gradients:
    """Compute the gradients of the leaves of losses (N,) with upstream (N,); empty if not wanted."""
    loss, result = Loss(RowArguments.of(arguments), scalars, code, softcap, entropy), scalars.dtype
    budget = Budget(hidden.device.type, chunk_tokens, chunk_bytes)
    with precise(hidden):
        head = LinearHead.of(hidden, weight, bias, lora_a, lora_b, scaling, result=result)
        reference = _reference(ref_hidden, ref_weight, ref_bias, result)
        *_, gradients = loss_chunks(hidden, head, reference, loss, wanted, upstream, budget, backend)
    return gradients.tensors


@linear_loss_gradient.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    return tuple(fake_gradients(inputs[:LEAVES], inputs[HEADS + 1].dtype, inputs[HEADS + 6]))


@custom_op("repo_kernels::linear_statistics", mutates_args=())
def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: Tensor | None,
    ids: Tensor,
    temperature: Tensor,
    softcap: float,
    entropy: int,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
    chunk_bytes: int | None,
    backend: str,
) -> Tensor:
    """Compute the STATE (7, N); differentiable through its first two rows, logp and entropy.

    temperature: 0-d or (N,), dtype of the sums, here and in `linear_slopes_gradient`.
    """
    budget = Budget(hidden.device.type, chunk_tokens, chunk_bytes)
    statistics = choice.load(backend).statistics
    with precise(hidden):
        head = LinearHead.of(hidden, weight, bias, lora_a, lora_b, scaling, result=temperature.dtype)
        return statistics_chunks(hidden, head, ids, temperature, softcap, entropy, budget, statistics)


@linear_statistics.register_fake
def _(*inputs: Any) -> Tensor:
    ids, temperature = inputs[LEAVES + 1 : LEAVES + 3]
    return temperature.new_empty(len(STATE), ids.shape[0])


def _keep_statistics(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, softcap, _, wanted, chunk_tokens, chunk_bytes, backend = inputs
    keep_dtypes(ctx, inputs, wanted)
    ctx.rest = softcap, list(wanted), chunk_tokens, chunk_bytes, backend
    ctx.save_for_backward(*map(kept, (*tensors, output)))


def _statistics_backward(ctx: Any, upstream: Tensor | None) -> tuple:
    if upstream is None:
        return (None,) * 14
    *tensors, state = (None if x is None else x.detach() for x in ctx.saved_tensors)
    if type(state) is Tensor:  # not traced
        refuse_second_order("linear_selective_log_softmax")
    slopes = torch.cat((upstream[:2], torch.zeros_like(upstream[:1])))  # there is no full KL
    totals = linear_slopes_gradient(*tensors, state, slopes, *ctx.rest)
    return *rounded(totals, ctx.dtypes), *(None,) * 9


linear_statistics.register_autograd(_statistics_backward, setup_context=_keep_statistics)


@custom_op("repo_kernels::linear_slopes_gradient", mutates_args=())
def linear_slopes_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: Tensor | None,
    ids: Tensor,
    temperature: Tensor,
    state: Tensor,
    slopes: Tensor,
    softcap: float,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
    chunk_bytes: int | None,
    backend: str,
) -> Gradients:
    """Compute the gradients of the leaves from STATE (7, N) and SLOPES (3, N); empty if not wanted."""
    budget = Budget(hidden.device.type, chunk_tokens, chunk_bytes)
    with precise(hidden):
        head = LinearHead.of(hidden, weight, bias, lora_a, lora_b, scaling, result=temperature.dtype)
        gradients = slope_chunks(hidden, head, ids, state, slopes, temperature, softcap, wanted, budget, backend)
    return gradients.tensors


@linear_slopes_gradient.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    temperature, wanted = inputs[LEAVES + 2], inputs[LEAVES + 6]
    return tuple(fake_gradients(inputs[:LEAVES], temperature.dtype, wanted))
