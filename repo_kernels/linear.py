"""The linear forms: logits = hidden @ weight^T + bias, which exist one chunk of live rows at a time.

Per chunk: GEMM -> a backend's kernel, which writes the gradient over the chunk's logits -> GEMMs into the gradients of
hidden, weight and bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import backends
from .arguments import LossArguments
from .autograd import refuse_second_order
from .eager import chunks, live_rows, put_rows, take_rows
from .rows import SCALARS, STATE, TOKENS, LossRows


@dataclass(frozen=True)
class Head:
    """A linear head in the compute dtype. weight: (V, H); bias: (V,) or None."""

    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V), in the compute dtype also under autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden, self.weight, self.bias)


def make_head(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Head:
    """A detached head in the compute dtype."""
    return Head(weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))


@dataclass
class HeadGradients:
    """Sums of dL/dhidden, dL/dweight, dL/dbias over chunks, in the compute dtype; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(hidden: Tensor, head: Head, wanted: tuple[bool, ...]) -> HeadGradients:
        """Nothing summed yet."""
        return HeadGradients(
            torch.zeros(hidden.shape, dtype=head.weight.dtype, device=hidden.device) if wanted[0] else None,
            torch.zeros_like(head.weight) if wanted[1] else None,
            torch.zeros_like(head.bias) if wanted[2] and head.bias is not None else None,
        )

    def add(self, index: Tensor, grad: Tensor, hidden: Tensor, head: Head) -> None:
        """grad: (n, V) dL/dlogits of the rows `index`; hidden: (n, H) of the compute dtype."""
        with torch.autocast(hidden.device.type, enabled=False):
            if self.hidden is not None:
                put_rows(self.hidden, index, grad @ head.weight)
            if self.weight is not None:
                self.weight.addmm_(grad.t(), hidden)
        if self.bias is not None:
            self.bias += grad.sum(0)


def _live_chunks(ids: Tensor, vocabulary: int, chunk_tokens: int | None) -> Iterator[Tensor]:
    """Flat indices of the live rows, (n,) at a time."""
    live = live_rows(ids, vocabulary)
    for start, stop in chunks(live.numel(), vocabulary, chunk_tokens):
        yield live[start:stop]


def _loss_chunks(
    rows: LossRows,
    hidden: Tensor,
    head: Head,
    reference: tuple[Tensor, Head] | None,
    gradients: HeadGradients | None,
    chunk_tokens: int | None,
    backend: str,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(losses (N,), tokens (13, N)). Gradients are added to `gradients`, rows times their `upstream` (N,) if given."""
    kernels, dtype = backends.load(backend), rows.values.dtype
    # grad_scale protects stored logits gradients from underflow; here nothing is stored
    scalars = rows.scalars.clone()
    scalars[SCALARS.index("grad_scale")] = 1.0
    losses, tokens = rows.values.new_zeros(rows.ids.numel()), rows.values.new_zeros(len(TOKENS), rows.ids.numel())
    for index in _live_chunks(rows.ids, head.weight.shape[0], chunk_tokens):
        x = take_rows(hidden, index, dtype)
        logits = head.logits(x)
        ref_logits = None if reference is None else reference[1].logits(take_rows(reference[0], index, dtype))
        part = replace(rows, ids=rows.ids[index], values=rows.values[:, index], scalars=scalars)
        losses[index], tokens[:, index] = kernels.fused(logits, ref_logits, part, logits if gradients else None)
        if gradients is not None:
            if upstream is not None:
                kernels.scale_rows(logits, upstream[index])
            gradients.add(index, logits, x, head)
    return losses, tokens


class LinearLoss(torch.autograd.Function):
    """(losses (N,), tokens (13, N)). Gradients are computed in the forward, but for a loss per token in the backward.

    A summed loss has one upstream gradient for all rows, which the backward multiplies in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        args: LossArguments,
        reference: tuple[Tensor, Head] | None,
        chunk_tokens: int | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        head = make_head(weight, bias, args.rows.values.dtype)
        wanted = ctx.needs_input_grad[:3]
        at_once = any(wanted) and not args.per_token_loss
        gradients = HeadGradients.zeros(hidden, head, wanted) if at_once else None
        losses, tokens = _loss_chunks(args.rows, hidden, head, reference, gradients, chunk_tokens, backend)
        ctx.mark_non_differentiable(tokens)
        ctx.set_materialize_grads(False)
        ctx.rest = args, reference, chunk_tokens, backend
        if gradients is None:
            ctx.save_for_backward(hidden, weight, bias)
        else:
            ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
            ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return losses, tokens

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple:
        refuse_second_order("linear_repo_loss")
        nothing = (None,) * 4
        if upstream is None:
            return None, None, None, *nothing
        args, reference, chunk_tokens, backend = ctx.rest
        if not args.per_token_loss:
            # the upstream gradient, which may be a loss scale, is applied before the only rounding
            factor = upstream[0] if upstream.numel() else upstream.new_zeros(())
            pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            return *(None if g is None else (g * factor).to(dtype) for g, dtype in pairs), *nothing
        hidden, weight, bias = ctx.saved_tensors
        head = make_head(weight, bias, args.rows.values.dtype)
        gradients = HeadGradients.zeros(hidden, head, ctx.needs_input_grad[:3])
        _loss_chunks(args.rows, hidden, head, reference, gradients, chunk_tokens, backend, upstream)
        return gradients.hidden, gradients.weight, gradients.bias, *nothing


@dataclass(frozen=True)
class LogprobProblem:
    """What a row's log-probability depends on besides hidden and head. ids: (N,); scalars: (8,); as in rows.py."""

    ids: Tensor
    scalars: Tensor
    softcap: float
    entropy: int
    chunk_tokens: int | None
    backend: str


class LinearLogprobs(torch.autograd.Function):
    """The STATE (7, N) of the rows; the chunks' logits are formed in the forward and again in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: LogprobProblem) -> Tensor:
        kernels, dtype = backends.load(problem.backend), problem.scalars.dtype
        head = make_head(weight, bias, dtype)
        state = problem.scalars.new_zeros(len(STATE), problem.ids.numel())
        for index in _live_chunks(problem.ids, weight.shape[0], problem.chunk_tokens):
            logits = head.logits(take_rows(hidden, index, dtype))
            ids = problem.ids[index]
            state[:, index] = kernels.statistics(logits, None, ids, problem.scalars, problem.softcap, problem.entropy)
        ctx.save_for_backward(hidden, weight, bias, state)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return state

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple:
        refuse_second_order("linear_selective_log_softmax")
        if upstream is None:
            return None, None, None, None
        hidden, weight, bias, state = ctx.saved_tensors
        problem: LogprobProblem = ctx.problem
        kernels, dtype = backends.load(problem.backend), problem.scalars.dtype
        head = make_head(weight, bias, dtype)
        gradients = HeadGradients.zeros(hidden, head, ctx.needs_input_grad[:3])
        slopes = torch.cat((upstream[:2], torch.zeros_like(upstream[:1])))
        for index in _live_chunks(problem.ids, weight.shape[0], problem.chunk_tokens):
            x = take_rows(hidden, index, dtype)
            logits = head.logits(x)
            kernels.apply(
                logits,
                None,
                problem.ids[index],
                state[:, index],
                slopes[:, index],
                problem.scalars,
                problem.softcap,
                logits,
            )
            gradients.add(index, logits, x, head)
        return gradients.hidden, gradients.weight, gradients.bias, None
