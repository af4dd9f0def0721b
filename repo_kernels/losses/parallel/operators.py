"""Operators of torch.library for a vocabulary that is divided among processes: what torch.compile sees of them.

Every process has all rows and forms, or has, the logits of its part of the vocabulary. Two all-reduces in the forward,
of a maximum and of sums per row, make them one softmax, and one in the backward sums dL/dhidden. They happen inside the
operators, which take the name of the group: all processes must run the same ones in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ...backends import choice
from ...backends.codes import IGNORED, STATE
from ...backends.memory_layout import gradient_buffer
from ...tensor_kinds import kept
from ..autograd import refuse_second_order
from ..heads.chunks import Budget
from ..heads.linear import LinearHead, slope_chunks, statistics_chunks
from ..heads.lora import HEAD_NAMES, LEAVES
from ..heads.operators import Gradients, fake_gradients, keep_dtypes, precise, rounded
from .shard import VocabularyShard
from .softmax import one_softmax, part_gradient, part_statistics

SUMMED = ("hidden", "lora_A")  # which every process holds whole


def _whole_state(local: Tensor, live: Tensor, owned: Tensor, entropy: int, shard: VocabularyShard) -> Tensor:
    """Compute the STATE (7, N) of the whole vocabulary, 0 on dead rows, of which `local` may have anything."""
    return torch.where(live, one_softmax(torch.where(live, local, 0.0), owned, entropy, shard), 0.0)


@custom_op("repo_kernels::divided_statistics", mutates_args=())
def divided_statistics(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    softcap: float,
    entropy: int,
    group: str,
    part: Sequence[int],
    backend: str,
) -> Tensor:
    """Compute the STATE (7, N) of the ids of the whole vocabulary from this process's columns of the logits.

    Args:
        logits: (T, V_r) or (B, L, V_r).
        ids: (N,) int64, of the whole vocabulary, IGNORED on dead rows; the same in every process.
        temperature: 0-d or (N,), compute dtype. softcap: 0.0 for none. entropy: ENTROPY_NONE or ENTROPY_VALUE.
        group, part: the name and the numbers of a `VocabularyShard`.
        backend: its name.
    """
    shard = VocabularyShard.of(group, part)
    shard.check_ids(ids)
    local_ids, owned = shard.local_ids(ids)
    local = part_statistics(logits, local_ids, temperature, softcap, entropy, backend)
    return _whole_state(local, ids != IGNORED, owned, entropy, shard)


@divided_statistics.register_fake
def _(logits: Tensor, ids: Tensor, temperature: Tensor, *_: Any) -> Tensor:
    return temperature.new_empty(len(STATE), ids.shape[0])


def _keep_logits(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, ids, temperature, softcap, _, group, part, backend = inputs
    ctx.rest = softcap, group, list(part), backend
    ctx.save_for_backward(logits, kept(ids), kept(temperature), output)
    ctx.set_materialize_grads(False)


def _slopes(upstream: Tensor) -> Tensor:
    """Return the SLOPES (3, N) for an upstream gradient of the STATE; there is no full KL."""
    return torch.cat((upstream[:2], torch.zeros_like(upstream[:1])))


def _statistics_backward(ctx: Any, upstream: Tensor | None) -> tuple:
    if upstream is None:
        return (None,) * 8
    logits, ids, temperature, state = ctx.saved_tensors
    if type(state) is Tensor:  # not traced
        refuse_second_order("selective_log_softmax")
    grad = divided_gradient(logits.detach(), ids, state.detach(), _slopes(upstream), temperature, *ctx.rest)
    return grad, *(None,) * 7


divided_statistics.register_autograd(_statistics_backward, setup_context=_keep_logits)


@custom_op("repo_kernels::divided_gradient", mutates_args=())
def divided_gradient(
    logits: Tensor,
    ids: Tensor,
    state: Tensor,
    slopes: Tensor,
    temperature: Tensor,
    softcap: float,
    group: str,
    part: Sequence[int],
    backend: str,
) -> Tensor:
    """Compute dL/dlogits of this process's columns from STATE (7, N) and SLOPES (3, N); nothing has to be summed."""
    local_ids, _ = VocabularyShard.of(group, part).local_ids(ids)
    grad, _ = choice.load(backend).new_gradient(logits, None)
    part_gradient(logits, local_ids, state, slopes, temperature, softcap, grad, backend=backend)
    return grad


@divided_gradient.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return gradient_buffer(logits)


@custom_op("repo_kernels::divided_linear_statistics", mutates_args=())
def divided_linear_statistics(
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
    group: str,
    part: Sequence[int],
    chunk_tokens: int | None,
    chunk_bytes: int | None,
    backend: str,
) -> Tensor:
    """Compute the STATE (7, N) of the ids of the whole vocabulary from hidden states and this process's part of a head.

    Args:
        hidden: (T, H) or (B, L, H), the same in every process.
        weight, bias: (V_r, H) and (V_r,) or None, the rows of this process.
        lora_a, lora_b, scaling: (r, H), the same in every process, (V_r, r) and 0-d; or None.
        wanted: which leaves get a gradient; the same in every process.
        chunk_tokens, chunk_bytes: what bounds a chunk.
        ids, temperature, softcap, entropy, group, part, backend: as in `divided_statistics`.
    """
    shard = VocabularyShard.of(group, part)
    shard.check_ids(ids)
    local_ids, owned = shard.local_ids(ids)
    budget = Budget(hidden.device.type, chunk_tokens, chunk_bytes, shard.processes)
    statistics = functools.partial(part_statistics, backend=backend)
    with precise(hidden):
        head = LinearHead.of(hidden, weight, bias, lora_a, lora_b, scaling, result=temperature.dtype)
        local = statistics_chunks(hidden, head, local_ids, temperature, softcap, entropy, budget, statistics)
    return _whole_state(local, ids != IGNORED, owned, entropy, shard)


@divided_linear_statistics.register_fake
def _(*inputs: Any) -> Tensor:
    ids, temperature = inputs[LEAVES + 1 : LEAVES + 3]
    return temperature.new_empty(len(STATE), ids.shape[0])


def _keep_head(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, softcap, _, wanted, group, part, chunk_tokens, chunk_bytes, backend = inputs
    keep_dtypes(ctx, inputs, wanted)
    ctx.rest = softcap, list(wanted), group, list(part), chunk_tokens, chunk_bytes, backend
    ctx.save_for_backward(*map(kept, (*tensors, output)))


def _linear_backward(ctx: Any, upstream: Tensor | None) -> tuple:
    if upstream is None:
        return (None,) * 16
    *tensors, state = (None if x is None else x.detach() for x in ctx.saved_tensors)
    if type(state) is Tensor:  # not traced
        refuse_second_order("linear_selective_log_softmax")
    totals = divided_linear_gradient(*tensors, state, _slopes(upstream), *ctx.rest)
    return *rounded(totals, ctx.dtypes), *(None,) * 11


divided_linear_statistics.register_autograd(_linear_backward, setup_context=_keep_head)


@custom_op("repo_kernels::divided_linear_gradient", mutates_args=())
def divided_linear_gradient(
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
    group: str,
    part: Sequence[int],
    chunk_tokens: int | None,
    chunk_bytes: int | None,
    backend: str,
) -> Gradients:
    """Compute the gradients of the leaves from STATE (7, N) and SLOPES (3, N); empty if not wanted.

    The logits are formed again. dL/dhidden and dL/dlora_A are summed over the processes.
    """
    shard = VocabularyShard.of(group, part)
    local_ids, _ = shard.local_ids(ids)
    budget = Budget(hidden.device.type, chunk_tokens, chunk_bytes, shard.processes)
    apply = functools.partial(part_gradient, backend=backend)
    with precise(hidden):
        head = LinearHead.of(hidden, weight, bias, lora_a, lora_b, scaling, result=temperature.dtype)
        rows = hidden, head, local_ids, state, slopes, temperature
        gradients = slope_chunks(*rows, softcap, wanted, budget, backend, apply)
    for name, total, want in zip(HEAD_NAMES, gradients.tensors, wanted, strict=False):
        if want and name in SUMMED:
            shard.add_up(total)
    return gradients.tensors


@divided_linear_gradient.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    temperature, wanted = inputs[LEAVES + 2], inputs[LEAVES + 6]
    return tuple(fake_gradients(inputs[:LEAVES], temperature.dtype, wanted))
