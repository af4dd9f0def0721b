"""The losses from logits under autograd, and rules that every backward of the losses follows.

The gradient of the logits is computed with the loss; backward only multiplies its rows by the upstream gradient. These
functions call a backend directly, which takes a tenth of the time of an operator of torch.library. Where something must
see an operator, `ops` has the same as one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choice
from ..backends.interface import Loss
from ..backends.memory_layout import gradient_buffer
from ..checks import check_bool
from ..tensor_kinds import has_values, written

# A loss, 0-d or (N,) without aggregation, ROWS (5, N) and STATS (18,).
Outputs = tuple[Tensor, Tensor, Tensor]
HELD_BY_AUTOGRAD = 3  # in PyTorch 2.13; a PyTorch that holds more makes backward copy, which a test would show


def refuse_second_order(name: str) -> None:
    """Raise RuntimeError in a backward that autograd records (create_graph=True).

    Its result would enter the graph as a constant, and a second backward would give a wrong gradient.

    name: the function that the message names.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} can be differentiated once: create_graph=True is not supported")


def may_run_again() -> bool:
    """Return whether the backward that runs now may run again, because its graph is retained."""
    keep: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return keep


def held_by_a_caller(result: Tensor) -> bool:
    """Return whether something besides autograd holds a result that an operator has saved, whose backward runs now.

    Such a result must stay as it is. Autograd and this backward hold HELD_BY_AUTOGRAD references to its memory.
    """
    references: int = torch._C._storage_Use_Count(result.untyped_storage()._cdata)
    return references > HELD_BY_AUTOGRAD


def is_batched(upstream: Tensor) -> bool:
    """Return whether backward runs for several upstream gradients at once: is_grads_batched, or a vmap around it."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling():
        return False
    # is_grads_batched still takes the first kind
    return functorch.is_legacy_batchedtensor(upstream) or functorch.is_batchedtensor(upstream)


def scaled_by_any(grad: Tensor, upstream: Tensor, flags: Tensor) -> Tensor:
    """Return a copy of grad (T, V) or (B, L, V) whose live rows are multiplied, in operators that vmap can batch."""
    rows = torch.where(flags != 0, upstream, 1.0).reshape(*grad.shape[:-1], 1)
    return (grad.to(rows.dtype) * rows).to(grad.dtype)


def loss_without_gradient(logits: Tensor, ref_logits: Tensor | None, loss: Loss, backend: str) -> Outputs:
    """Compute the outputs of a loss whose logits need no gradient."""
    value, stats, results = choice.load(backend).whole(logits, ref_logits, loss, None)
    return (results.rows[0] if loss.per_token else value), results.rows, stats


class FusedLoss(torch.autograd.Function):
    """Compute the outputs of a loss, and its gradient in a new buffer."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor | None, loss: Loss, backend: str) -> Outputs:
        kernels = choice.load(backend)
        grad, zeroed = kernels.new_gradient(logits, loss.arguments)
        value, stats, results = kernels.whole(logits, ref_logits, loss, grad, zeroed)
        ctx.mark_non_differentiable(results.rows, stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, results.flags)
        ctx.backend = backend
        return (results.rows[0].clone() if loss.per_token else value), results.rows, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:
        refuse_second_order("repo_loss")
        if upstream is None:
            return (None,) * 4
        grad, flags = ctx.saved_tensors
        if is_batched(upstream):
            return scaled_by_any(grad, upstream, flags), None, None, None
        # unless the graph is retained, nobody else reads the buffer
        if may_run_again():
            grad = gradient_buffer(grad).copy_(grad)
        choice.load(ctx.backend).scale_rows(grad, written(upstream), flags)
        torch.autograd.graph.increment_version(grad)
        return grad, None, None, None


class InplaceLoss(torch.autograd.Function):
    """Compute the outputs of a loss and write the gradient over the logits: one buffer instead of two, one backward.

    It cannot be an operator of torch.library: one that mutates its input cannot register autograd. `buffer` is the
    detached logits, which share memory and version counter with them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor | None, loss: Loss, buffer: Tensor, backend: str
    ) -> Outputs:
        value, stats, results = choice.load(backend).whole(buffer, ref_logits, loss, buffer)
        torch.autograd.graph.increment_version(buffer)
        ctx.mark_non_differentiable(results.rows, stats)
        ctx.set_materialize_grads(False)
        ctx.buffer, ctx.version, ctx.backend, ctx.flags = buffer, buffer._version, backend, results.flags
        return (results.rows[0].clone() if loss.per_token else value), results.rows, stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:
        refuse_second_order("repo_loss")
        if upstream is None:
            return (None,) * 5
        buffer, ctx.buffer = ctx.buffer, None
        if buffer is None:
            raise RuntimeError("repo_loss(inplace=True) was already differentiated: its gradient buffer is consumed")
        if buffer._version != ctx.version:
            raise RuntimeError(
                "repo_loss(inplace=True): the logits hold the gradient and were modified before backward"
            )
        if is_batched(upstream):
            return scaled_by_any(buffer, upstream, ctx.flags), None, None, None, None
        choice.load(ctx.backend).scale_rows(buffer, written(upstream), ctx.flags)
        torch.autograd.graph.increment_version(buffer)
        return buffer, None, None, None, None


def check_inplace(inplace: bool, logits: Tensor, direct: bool) -> bool:
    """Return whether to overwrite the logits: not if they have shapes alone. Raises ValueError if it cannot be done."""
    check_bool("inplace", inplace)
    if not inplace:
        return False
    if torch.compiler.is_compiling():
        raise ValueError("inplace=True overwrites its input and cannot be traced by torch.compile; use inplace=False")
    if not has_values(logits):
        return False
    if not direct:
        raise ValueError(
            "inplace=True writes where the logits lie, and takes plain tensors only: no subclass, no lazy negation, no "
            f"transform or dispatch mode around the call; got logits of type {type(logits).__name__}; use inplace=False"
        )
    reach = 1  # elements that the dimensions of smaller stride cover
    for stride, size in sorted((st, n) for st, n in zip(logits.stride(), logits.shape, strict=True) if n > 1):
        if stride < reach:
            raise ValueError(f"logits must not overlap in memory with inplace=True; got strides {logits.stride()}")
        reach = stride * (size - 1) + reach
    return True
