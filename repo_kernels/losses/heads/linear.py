"""The linear losses: logits = hidden @ weight^T + bias, of which one chunk of live rows exists at a time.

For each chunk: a GEMM gives its logits, a backend's kernel writes the gradient over them, and GEMMs carry it into the
gradients of hidden, weight and bias. A low-rank part of the weight takes thin GEMMs of its own (low_rank.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...backends import choice
from ...backends.codes import IGNORED, SCALARS, STATE
from ...backends.eager import dense
from ...backends.interface import Loss, RowArguments, RowResults, at_rows
from .chunks import Budget, HeadSizes, row_stride
from .gemm import (
    add_outer,
    add_product,
    add_thin_product,
    allocates,
    column_blocks,
    factor_dtype,
    fp16_scale,
    new_product,
    product,
)
from .live_rows import LiveRows
from .low_rank import LowRank, LowRankGradients


@dataclass(frozen=True)
class LinearHead:
    """The linear head of a language model, in the dtypes of its GEMMs.

    Args:
        weight: (V, H), dtype of the factors.
        bias: (V,), dtype of the sums, or None.
        low_rank: what is added to the weight, or None.
    """

    weight: Tensor
    bias: Tensor | None
    low_rank: LowRank | None = None

    @staticmethod
    def of(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, *lora: Tensor | None, result: torch.dtype
    ) -> LinearHead:
        """Cast the weights for these hidden states; those of another dtype than the factors' are copied, once a call.

        lora: lora_A, lora_B and scaling, or nothing. result: dtype of the sums.
        """
        factors = factor_dtype(hidden.dtype, hidden.device, result)
        bias = None if bias is None else bias.detach().to(result)
        return LinearHead(weight.detach().to(factors), bias, LowRank.of(*lora, factors=factors, result=result))

    def sizes(self, result: torch.dtype, sides: int, with_gradient: bool, with_weight: bool) -> HeadSizes:
        """Return what the memory of a chunk depends on."""
        vocabulary, width = self.weight.shape
        rank = 0 if self.low_rank is None else self.low_rank.rank
        return HeadSizes(vocabulary, width, self.weight.dtype, result, sides, with_gradient, with_weight, rank)

    def logits(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Compute the logits (n, V) of x (n, H), which has the factors' dtype, in `out` or in new memory."""
        z = None if self.low_rank is None else self.low_rank.inner(x)
        if out is None:
            out = new_product(x, self.weight.t())
            self._add_low_rank(z, out, slice(None))
        else:
            for block in column_blocks(x.device, x.dtype, out.shape[1]):
                product(x, self.weight[block].t(), out[:, block])
                self._add_low_rank(z, out, block)  # while the block is in the caches
        if self.bias is not None:
            out += self.bias
        return out

    def _add_low_rank(self, z: Tensor | None, out: Tensor, block: slice) -> None:
        if z is not None and self.low_rank is not None:
            add_outer(z, self.low_rank.b[block], out[:, block])


@dataclass(frozen=True)
class Side:
    """The policy or its reference: live hidden states, head, and memory for one chunk.

    Args:
        rows: (n, H) live hidden states.
        head: their head.
        buffer: (chunk, V) for the logits, or None if the fastest product allocates them.
    """

    rows: Tensor
    head: LinearHead
    buffer: Tensor | None

    @staticmethod
    def of(hidden: Tensor, head: LinearHead, live: LiveRows, size: int, result: torch.dtype) -> Side:
        """Gather the live hidden states and allocate the buffer for chunks of `size` rows."""
        rows = live.take_hidden(hidden.detach())
        if allocates(hidden.device, head.weight.dtype):
            return Side(rows, head, None)
        return Side(rows, head, chunk_buffer(size, head, result))

    def chunk(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Compute (hidden states (c, H) in the factors' dtype, logits (c, V)) of the live rows from start to stop."""
        x = self.rows[start:stop].to(self.head.weight.dtype)
        return x, self.head.logits(x, None if self.buffer is None else self.buffer[: stop - start])


def chunk_buffer(size: int, head: LinearHead, dtype: torch.dtype) -> Tensor:
    """Allocate (size, V) whose rows begin at 16-byte boundaries."""
    columns = head.weight.shape[0]
    return torch.empty(size, row_stride(columns), dtype=dtype, device=head.weight.device)[:, :columns]


def chunks(live: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive chunks."""
    for start in range(0, live, size):
        yield start, min(start + size, live)


def gradient_rows(head: LinearHead, size: int, result: torch.dtype) -> Tensor | None:
    """Allocate the gradient of a chunk's logits in the dtype of its GEMMs; None: it is written over the logits."""
    return None if head.weight.dtype == result else chunk_buffer(size, head, head.weight.dtype)


class HeadGradients:
    """dL/dhidden (0 on dead rows), dL/dweight, dL/dbias and those of a low-rank part; None if not wanted.

    They are summed over chunks in the sums' dtype.
    The first chunk writes dL/dweight, later ones add to it.
    """

    def __init__(
        self, hidden: Tensor, head: LinearHead, live: LiveRows, result: torch.dtype, wanted: Sequence[bool]
    ) -> None:
        self.live, self.head = live, head
        self.hidden = self.rows = self.weight = self.bias = None
        if wanted[0]:
            empty = hidden.new_empty if live.index is None else hidden.new_zeros
            self.hidden = empty(hidden.shape, dtype=result)
            self.rows = self.hidden.view(-1, hidden.shape[-1])
        if wanted[1]:
            self.weight = (hidden.new_empty if live.count else hidden.new_zeros)(head.weight.shape, dtype=result)
        if wanted[2]:
            self.bias = hidden.new_zeros(head.weight.shape[:1], dtype=result)
        low_rank = head.low_rank
        self.low_rank = None if low_rank is None else LowRankGradients.zeros(low_rank, wanted[3:])

    def add(self, start: int, stop: int, grad: Tensor, x: Tensor) -> None:
        """Add a chunk. grad: (c, V), dL/dlogits of the live rows from start to stop; x: (c, H); factors' dtype."""
        if self.bias is not None:
            self.bias += grad.sum(0, dtype=self.bias.dtype)
        inner = None
        if self.low_rank is not None:
            inner = self.low_rank.add(grad, x, self.rows is not None)
        if self.rows is not None:
            self._write_hidden(start, stop, grad, inner)
        if self.weight is not None:
            (add_product if start else product)(grad.t(), x, self.weight)

    def _write_hidden(self, start: int, stop: int, grad: Tensor, inner: Tensor | None) -> None:
        """inner: (c, r), the gradient of h A^T, or None without a low-rank part."""
        assert self.rows is not None
        index = self.live.index
        part = self.rows[start:stop] if index is None else self.rows.new_empty(stop - start, self.rows.shape[1])
        product(grad, self.head.weight, part)
        if inner is not None and self.head.low_rank is not None:
            add_thin_product(inner, self.head.low_rank.a, part)
        if index is not None:
            self.rows.index_copy_(0, index[start:stop], part)

    def divide(self, scale: Tensor, backend: str) -> None:
        """Divide the sums by a 0-d power of two; if it is 1, no memory is touched."""
        for total in self._totals():
            if total is not None:
                scale_all(total, 1 / scale, backend)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of hidden, weight, bias, lora_A and lora_B; an empty tensor for one that is not wanted."""
        like = self.head.weight
        hidden, weight, bias, a, b = (like.new_empty(0) if total is None else total for total in self._totals())
        return hidden, weight, bias, a, b

    def _totals(self) -> tuple[Tensor | None, ...]:
        low_rank = self.low_rank
        of_factors = (None, None) if low_rank is None else (low_rank.a, low_rank.b)
        return self.hidden, self.weight, self.bias, *of_factors


def scale_all(total: Tensor, factor: Tensor, backend: str) -> None:
    """Multiply a contiguous tensor in place by a 0-d factor that only the device reads; 1 leaves it untouched."""
    if total.numel():
        choice.load(backend).scale_rows(total.view(-1, total.shape[-1]), factor.to(total.dtype), None)


def _alive(arguments: RowArguments) -> Tensor:
    """Return which rows are live, (N,) bool."""
    alive, bounds = arguments.token_ids.reshape(-1) != IGNORED, arguments.cu_seqlens
    if arguments.response_mask is not None:
        alive &= arguments.response_mask.reshape(-1)
    if bounds is not None:
        index = torch.arange(alive.numel(), device=alive.device)
        alive &= (index >= bounds[0]) & (index < bounds[-1])
    return alive


def loss_chunks(
    hidden: Tensor,
    head: LinearHead,
    reference: tuple[Tensor, LinearHead] | None,
    loss: Loss,
    wanted: Sequence[bool],
    upstream: Tensor | None,
    budget: Budget,
    backend: str,
) -> tuple[Tensor, Tensor, RowResults, HeadGradients]:
    """Compute the loss, STATS (18,), the rows' results and the gradients of the head and its input.

    Args:
        hidden: (T, H) or (B, L, H).
        head: their head.
        reference: hidden states and head of the reference for the full KL, or None.
        loss: the rest of the loss; its scalars are a tensor.
        wanted: whether hidden, weight and bias get a gradient.
        upstream: (N,), multiplies the gradient of each row; None for 1.
        budget: how many rows a chunk takes.
        backend: its name.
    """
    assert isinstance(loss.scalars, Tensor)
    kernels, result, graded = choice.load(backend), loss.scalars.dtype, any(wanted)
    live = LiveRows.of(_alive(loss.arguments))
    size = budget.rows(live.count, head.sizes(result, 1 if reference is None else 2, graded, wanted[1]))
    side = Side.of(hidden, head, live, size, result)
    other = None if reference is None else Side.of(reference[0], reference[1], live, size, result)
    gradients = HeadGradients(hidden, head, live, result, wanted)
    narrow = gradient_rows(head, size, result) if graded else None
    # the caller's grad_scale is for gradients that are stored rounded; here only factors in fp16 need a scale
    scale = loss.scalars.new_ones(())
    if graded and head.weight.dtype == torch.float16:
        weights = dense.prepare(hidden, loss).values["weights"]
        scale = fp16_scale(weights if upstream is None else weights * upstream)
    scalars = loss.scalars.clone()
    scalars[SCALARS.index("grad_scale")] = scale
    loss = replace(loss, scalars=scalars)
    prepared = kernels.prepare(hidden, loss)
    results = RowResults.allocate(hidden, live.total, zeros=live.index is not None)
    for start, stop in chunks(live.count, size):
        x, logits = side.chunk(start, stop)
        ref_logits = None if other is None else other.chunk(start, stop)[1]
        grad = (logits if narrow is None else narrow[: stop - start]) if graded else None
        kernels.fused(logits, ref_logits, loss, prepared, results, grad, live.range(start, stop), upstream)
        if grad is not None:
            gradients.add(start, stop, grad, x)
        del logits, ref_logits, grad  # freed before the next chunk's are allocated
    if graded and head.weight.dtype == torch.float16:
        gradients.divide(scale, backend)
    return *kernels.reduce(loss, prepared, results), results, gradients


def statistics_chunks(
    hidden: Tensor,
    head: LinearHead,
    ids: Tensor,
    temperature: Tensor,
    softcap: float,
    entropy: int,
    budget: Budget,
    statistics: Callable[..., Tensor],
) -> Tensor:
    """Compute the STATE (7, N) of the rows; arguments as in `loss_chunks`.

    temperature: 0-d or (N,). statistics: of a backend.
    """
    result, live = temperature.dtype, LiveRows.of(ids != IGNORED)
    size = budget.rows(live.count, head.sizes(result, 1, False, False))
    side, ids, temperature = Side.of(hidden, head, live, size, result), live.take(ids), live.take(temperature)
    state = temperature.new_empty(len(STATE), live.count)
    for start, stop in chunks(live.count, size):
        _, logits = side.chunk(start, stop)
        by = at_rows(temperature, slice(start, stop))
        state[:, start:stop] = statistics(logits, ids[start:stop], by, softcap, entropy)
        del logits  # freed before the next chunk's are allocated
    return live.spread(state)


def slope_chunks(
    hidden: Tensor,
    head: LinearHead,
    ids: Tensor,
    state: Tensor,
    slopes: Tensor,
    temperature: Tensor,
    softcap: float,
    wanted: Sequence[bool],
    budget: Budget,
    backend: str,
    apply: Callable[..., None] | None = None,
) -> HeadGradients:
    """Compute gradients from the STATE (7, N) and the SLOPES (3, N) of the rows, whose logits are formed again.

    apply: instead of the backend's; None for that.
    """
    apply = choice.load(backend).apply if apply is None else apply
    result, live = temperature.dtype, LiveRows.of(ids != IGNORED)
    size = budget.rows(live.count, head.sizes(result, 1, True, wanted[1]))
    side, gradients = Side.of(hidden, head, live, size, result), HeadGradients(hidden, head, live, result, wanted)
    narrow = gradient_rows(head, size, result)
    ids, state, slopes, temperature = (live.take(x) for x in (ids, state, slopes, temperature))
    scale = fp16_scale(slopes) if head.weight.dtype == torch.float16 else None
    if scale is not None:
        slopes = slopes * scale
    for start, stop in chunks(live.count, size):
        x, logits = side.chunk(start, stop)
        grad = logits if narrow is None else narrow[: stop - start]
        by_row = state[:, start:stop].contiguous(), slopes[:, start:stop].contiguous()
        apply(logits, ids[start:stop], *by_row, at_rows(temperature, slice(start, stop)), softcap, grad)
        gradients.add(start, stop, grad, x)
        del logits, grad  # freed before the next chunk's are allocated
    if scale is not None:
        gradients.divide(scale, backend)
    return gradients
