"""selective_log_softmax and its linear form: log-probabilities of given tokens, differentiable, with the entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager
from .arguments import Layout, make_layout
from .checks import (
    Scalar,
    check_backend,
    check_chunk_tokens,
    check_head,
    check_ids,
    check_matrix,
    check_temperature,
    compute_dtype,
    describe,
)


@dataclass(frozen=True)
class _Problem:
    """What a row's log-probability depends on besides the logits. ids: (n,) of live rows; temperature: 0-d."""

    layout: Layout
    ids: Tensor
    temperature: Tensor
    softcap: float | None
    with_entropy: bool
    chunk_tokens: int | None

    @property
    def dtype(self) -> torch.dtype:
        return self.temperature.dtype

    def spread(self, parts: list[Tensor]) -> Tensor:
        """(n,) in chunks -> leading shape, 0 on dead rows."""
        live = self.layout.live
        out = torch.zeros(live.numel(), dtype=self.dtype, device=live.device)
        if parts:
            out[self.layout.rows] = torch.cat(parts)
        return out.view(self.layout.leading)

    def upstream(self, gradient: Tensor | None) -> Tensor:
        """(n,) upstream gradient of live rows, from any stride; zeros when the output was not used."""
        if gradient is None:
            return torch.zeros(self.ids.shape, dtype=self.dtype, device=self.ids.device)
        return gradient.reshape(-1)[self.layout.rows].to(self.dtype)


LogitsOf = Callable[[Tensor], Tensor]  # flat row index (c,) -> logits (c, V) of the compute dtype


def _forward(problem: _Problem, vocabulary: int, logits_of: LogitsOf) -> tuple[Tensor, Tensor | None]:
    """logps and entropy (or None) in the leading shape."""
    logps: list[Tensor] = []
    entropies: list[Tensor] = []
    for start, stop in eager.chunks(problem.ids.numel(), vocabulary, problem.chunk_tokens):
        logits = logits_of(problem.layout.rows[start:stop])
        rows = eager.make_rows(logits, problem.temperature, problem.softcap)
        logps.append(eager.target_logps(rows, problem.ids[start:stop]))
        if problem.with_entropy:
            entropies.append(eager.row_entropy(rows))
    return problem.spread(logps), problem.spread(entropies) if problem.with_entropy else None


def _backward(
    problem: _Problem, vocabulary: int, logits_of: LogitsOf, up_logps: Tensor | None, up_entropy: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(flat row index, dL/dlogits) chunk by chunk; the log-probabilities are recomputed."""
    g_logp, g_entropy = problem.upstream(up_logps), problem.upstream(up_entropy)
    for start, stop in eager.chunks(problem.ids.numel(), vocabulary, problem.chunk_tokens):
        index, ids = problem.layout.rows[start:stop], problem.ids[start:stop]
        rows = eager.make_rows(logits_of(index), problem.temperature, problem.softcap)
        entropy = None if up_entropy is None else eager.row_entropy(rows)
        yield (
            index,
            eager.apply_rows(
                rows, ids, problem.temperature, problem.softcap, g_logp[start:stop], g_entropy[start:stop], entropy
            ),
        )


class _SelectiveLogSoftmax(torch.autograd.Function):
    """Keeps the logits; the backward recomputes each chunk's log-probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, problem: _Problem) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(logits)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return _forward(problem, logits.shape[-1], lambda index: eager.take_rows(logits, index, problem.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, up_logps: Tensor | None, up_entropy: Tensor | None) -> tuple:
        (logits,) = ctx.saved_tensors
        problem: _Problem = ctx.problem
        grad = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)

        def logits_of(index: Tensor) -> Tensor:
            return eager.take_rows(logits, index, problem.dtype)

        for index, chunk in _backward(problem, logits.shape[-1], logits_of, up_logps, up_entropy):
            eager.put_rows(grad, index, chunk)
        return grad, None


class _LinearSelectiveLogSoftmax(torch.autograd.Function):
    """Forms the logits chunk by chunk in the forward and again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: _Problem
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        head = eager.make_head(weight, bias, problem.dtype)
        return _forward(
            problem, weight.shape[0], lambda index: head.logits(eager.take_rows(hidden, index, problem.dtype))
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, up_logps: Tensor | None, up_entropy: Tensor | None) -> tuple:
        hidden, weight, bias = ctx.saved_tensors
        problem: _Problem = ctx.problem
        head = eager.make_head(weight, bias, problem.dtype)
        gradients = eager.HeadGradients.zeros(hidden, head, ctx.needs_input_grad[:3], problem.dtype)

        def logits_of(index: Tensor) -> Tensor:
            return head.logits(eager.take_rows(hidden, index, problem.dtype))

        for index, chunk in _backward(problem, weight.shape[0], logits_of, up_logps, up_entropy):
            gradients.add(index, chunk, eager.take_rows(hidden, index, problem.dtype), head)
        return gradients.hidden, gradients.weight, gradients.bias, None


def _check_tail(temperature: Scalar, softcap: float | None, return_entropy: bool, backend: str | None) -> None:
    check_backend(backend)
    check_temperature(temperature, softcap)
    if not isinstance(return_entropy, bool):
        raise TypeError(f"return_entropy must be a bool; got {describe(return_entropy)}")


def selective_log_softmax(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(softcap(logits) / temperature)[token_ids], and the entropy, without keeping the (T, V) log-probs.

    Args:
        logits: (T, V) or (B, L, V); fp32, bf16, fp16 or fp64; any row stride, unit column stride.
        token_ids: leading shape, int64 or int32; rows with -100 give 0 and gradient 0.
        temperature: float > 0 or 0-d tensor. softcap: float > 0 or None.
        return_entropy: also return H in nats.
        backend: None (by device) or "eager".

    Returns:
        logps, or (logps, entropy): leading shape, fp32 (fp64 for fp64 logits), both differentiable in the logits.

    Raises:
        TypeError, ValueError: a wrong argument, named. IndexError: a live id outside [0, V).
    """
    _check_tail(temperature, softcap, return_entropy, backend)
    check_matrix("logits", logits)
    layout = make_layout(tuple(logits.shape[:-1]), token_ids, None, None, logits)
    ids = check_ids(token_ids, layout.rows, logits.shape[-1])
    scalar = torch.as_tensor(temperature, dtype=compute_dtype(logits), device=logits.device).detach()
    problem = _Problem(layout, ids, scalar, softcap, return_entropy, None)
    logps, entropy = _SelectiveLogSoftmax.apply(logits, problem)
    return (logps, entropy) if return_entropy else logps


def linear_selective_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """selective_log_softmax of logits = hidden @ weight^T + bias, which exist only one chunk of live tokens at a time.

    Args:
        hidden: (T, H) or (B, L, H). weight: (V, H), bias: (V,), of hidden's dtype.
        chunk_tokens: live tokens per chunk; None: about 32 MB of logits.
        The other arguments, the result and the errors are those of selective_log_softmax; differentiable in hidden,
        weight and bias.
    """
    _check_tail(temperature, softcap, return_entropy, backend)
    check_head("", hidden, weight, bias)
    check_chunk_tokens(chunk_tokens)
    layout = make_layout(tuple(hidden.shape[:-1]), token_ids, None, None, hidden)
    ids = check_ids(token_ids, layout.rows, weight.shape[0])
    scalar = torch.as_tensor(temperature, dtype=compute_dtype(hidden), device=hidden.device).detach()
    problem = _Problem(layout, ids, scalar, softcap, return_entropy, chunk_tokens)
    logps, entropy = _LinearSelectiveLogSoftmax.apply(hidden, weight, bias, problem)
    return (logps, entropy) if return_entropy else logps
