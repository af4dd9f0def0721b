"""The linear losses: logits = hidden @ weight^T + bias, of which one chunk of live rows exists at a time.

For each chunk: a GEMM gives its logits, a backend's kernel writes the gradient over them, and GEMMs carry it into the
gradients of hidden, weight and bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import choice
from ..backends.eager.kernels import take_rows
from ..backends.interface import IGNORED, SCALARS, STATE, TOKENS, VALUES, LossRows
from .gemm import add_product, allocates, factor_dtype, fp16_scale, new_product, product

CHUNK_BYTES = 64_000_000
# The row stride of a chunk is an odd multiple of this many elements: rows are aligned for any V, and do not all fall
# into the same cache sets, as rows of 49 152 entries would.
ROW_STEP = 16


@dataclass(frozen=True)
class LiveRows:
    """The n of N rows whose id is not ignored.

    Args:
        total: N.
        count: n.
        index: (n,) int64, or None if all rows are live, so that nothing has to be gathered.
    """

    total: int
    count: int
    index: Tensor | None

    @staticmethod
    def of(ids: Tensor) -> LiveRows:
        """Find the live rows of ids (N,). Their number decides the chunks: here alone the host waits for the device."""
        index = (ids != IGNORED).nonzero().squeeze(1)
        total, count = ids.numel(), index.numel()
        return LiveRows(total, count, None if count == total else index)

    def take(self, columns: Tensor) -> Tensor:
        """Gather the live columns: (..., N) -> (..., n)."""
        return columns if self.index is None else columns.index_select(-1, self.index)

    def take_hidden(self, hidden: Tensor) -> Tensor:
        """Gather the live rows: (T, H) or (B, L, H) -> (n, H)."""
        if self.index is None:
            return hidden.reshape(-1, hidden.shape[-1])
        return take_rows(hidden, self.index, hidden.dtype)

    def spread(self, columns: Tensor) -> Tensor:
        """Scatter live columns: (..., n) -> (..., N), 0 on dead rows."""
        if self.index is None:
            return columns
        return columns.new_zeros(*columns.shape[:-1], self.total).index_copy_(-1, self.index, columns)


@dataclass(frozen=True)
class LinearHead:
    """The linear head of a language model, in the dtypes of its GEMMs.

    Args:
        weight: (V, H), dtype of the factors.
        bias: (V,), dtype of the sums, or None.
    """

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, result: torch.dtype) -> LinearHead:
        """Cast the weights for these hidden states; those of another dtype than the factors' are copied, once a call.

        result: dtype of the sums.
        """
        factors = factor_dtype(hidden.dtype, hidden.device, result)
        return LinearHead(weight.detach().to(factors), None if bias is None else bias.detach().to(result))

    def logits(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Compute the logits (n, V) of x (n, H), which has the factors' dtype, in `out` or in new memory."""
        if out is None:
            out = new_product(x, self.weight.t())
        else:
            product(x, self.weight.t(), out)
        if self.bias is not None:
            out += self.bias
        return out


@dataclass(frozen=True)
class Side:
    """The policy or its reference: live hidden states, head, and memory for the logits of one chunk.

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
        columns, rows = head.weight.shape[0], live.take_hidden(hidden.detach())
        if allocates(hidden.device, head.weight.dtype):
            return Side(rows, head, None)
        buffer = torch.empty(size, row_stride(columns), dtype=result, device=hidden.device)
        return Side(rows, head, buffer[:, :columns])

    def chunk(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Compute (hidden states (c, H) in the factors' dtype, logits (c, V)) of the live rows from start to stop."""
        x = self.rows[start:stop].to(self.head.weight.dtype)
        return x, self.head.logits(x, None if self.buffer is None else self.buffer[: stop - start])


def row_stride(vocabulary: int) -> int:
    """Return the row stride of a chunk's logits, in elements."""
    return ROW_STEP * (-(-vocabulary // ROW_STEP) | 1)


def chunk_size(live: int, row_bytes: int, chunk_tokens: int | None) -> int:
    """Return the rows per chunk: `chunk_tokens`, or even chunks that fit into CHUNK_BYTES; at least 1."""
    if chunk_tokens is not None:
        return max(1, min(chunk_tokens, live))
    most = max(1, CHUNK_BYTES // row_bytes)
    return max(1, -(-live // max(1, -(-live // most))))


def chunks(live: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive chunks."""
    for start in range(0, live, size):
        yield start, min(start + size, live)


class HeadGradients:
    """dL/dhidden (0 on dead rows), dL/dweight and dL/dbias, summed over chunks in the sums' dtype; None if not wanted.

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

    def add(self, start: int, stop: int, grad: Tensor, x: Tensor) -> None:
        """Add a chunk. grad: (c, V), dL/dlogits of the live rows from start to stop; x: (c, H), factors' dtype."""
        if self.bias is not None:
            self.bias += grad.sum(0)
        grad = grad.to(x.dtype)
        if self.rows is not None:
            self._write_hidden(start, stop, grad)
        if self.weight is not None:
            (add_product if start else product)(grad.t(), x, self.weight)

    def _write_hidden(self, start: int, stop: int, grad: Tensor) -> None:
        assert self.rows is not None
        index = self.live.index
        part = self.rows[start:stop] if index is None else self.rows.new_empty(stop - start, self.rows.shape[1])
        product(grad, self.head.weight, part)
        if index is not None:
            self.rows.index_copy_(0, index[start:stop], part)

    def divide(self, scale: Tensor, backend: str) -> None:
        """Divide the sums by a 0-d power of two; if it is 1, no memory is touched."""
        for total in (self.rows, self.weight, self.bias):
            if total is not None:
                scale_all(total, 1 / scale, backend)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of hidden, weight and bias; an empty tensor for one that is not wanted."""
        like = self.head.weight
        hidden, weight, bias = (
            like.new_empty(0) if total is None else total for total in (self.hidden, self.weight, self.bias)
        )
        return hidden, weight, bias


def scale_all(total: Tensor, factor: Tensor, backend: str) -> None:
    """Multiply a contiguous tensor in place by a 0-d factor that only the device reads; 1 leaves it untouched."""
    if total.numel():
        rows = total.view(-1, total.shape[-1])
        choice.load(backend).scale_rows(rows, factor.to(total.dtype).expand(rows.shape[0]))


def row_bytes(head: LinearHead, result: torch.dtype, buffers: int, with_gradient: bool) -> int:
    """Return the bytes that one row of a chunk takes: logits in each buffer, and copies for the gradient's GEMMs."""
    vocabulary, width = head.weight.shape
    size = buffers * row_stride(vocabulary) * result.itemsize
    if with_gradient:
        narrow = head.weight.dtype.itemsize if head.weight.dtype != result else 0
        size += vocabulary * narrow + width * result.itemsize
    return size


def loss_chunks(
    hidden: Tensor,
    head: LinearHead,
    reference: tuple[Tensor, LinearHead] | None,
    rows: LossRows,
    wanted: Sequence[bool],
    upstream: Tensor | None,
    chunk_tokens: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, HeadGradients]:
    """Compute losses (N,), tokens (13, N) and the gradients of the head and its input.

    Args:
        hidden: (T, H) or (B, L, H).
        head: their head.
        reference: hidden states and head of the reference for the full KL, or None.
        rows: the rest of the loss.
        wanted: whether hidden, weight and bias get a gradient.
        upstream: (N,), multiplies the gradient of each row; None for 1.
        chunk_tokens: live rows per chunk or None.
        backend: its name.
    """
    kernels, result = choice.load(backend), rows.values.dtype
    live, graded = LiveRows.of(rows.ids), any(wanted)
    size = chunk_size(live.count, row_bytes(head, result, 1 if reference is None else 2, graded), chunk_tokens)
    side = Side.of(hidden, head, live, size, result)
    other = None if reference is None else Side.of(reference[0], reference[1], live, size, result)
    gradients = HeadGradients(hidden, head, live, result, wanted)
    ids, values = live.take(rows.ids), live.take(rows.values)
    upstream = None if upstream is None else live.take(upstream)
    # the caller's grad_scale is for gradients that are stored rounded; here only factors in fp16 need a scale
    scale = rows.scalars.new_ones(())
    if graded and head.weight.dtype == torch.float16:
        weights = values[VALUES.index("weights")]
        scale = fp16_scale(weights if upstream is None else weights * upstream)
    scalars = rows.scalars.clone()
    scalars[SCALARS.index("grad_scale")] = scale
    losses, tokens = rows.values.new_empty(live.count), rows.values.new_empty(len(TOKENS), live.count)
    for start, stop in chunks(live.count, size):
        x, logits = side.chunk(start, stop)
        part = replace(rows, ids=ids[start:stop], values=values[:, start:stop].contiguous(), scalars=scalars)
        ref_logits = None if other is None else other.chunk(start, stop)[1]
        losses[start:stop], tokens[:, start:stop] = kernels.fused(logits, ref_logits, part, logits if graded else None)
        if graded and upstream is not None:
            kernels.scale_rows(logits, upstream[start:stop])
        if graded:
            gradients.add(start, stop, logits, x)
        del logits, ref_logits  # freed before the next chunk's are allocated
    if graded and head.weight.dtype == torch.float16:
        gradients.divide(scale, backend)
    return live.spread(losses), live.spread(tokens), gradients


def statistics_chunks(
    hidden: Tensor,
    head: LinearHead,
    ids: Tensor,
    scalars: Tensor,
    softcap: float,
    entropy: int,
    chunk_tokens: int | None,
    backend: str,
) -> Tensor:
    """Compute the STATE (7, N) of the rows; arguments as in `loss_chunks`."""
    kernels, result, live = choice.load(backend), scalars.dtype, LiveRows.of(ids)
    size = chunk_size(live.count, row_bytes(head, result, 1, with_gradient=False), chunk_tokens)
    side, ids = Side.of(hidden, head, live, size, result), live.take(ids)
    state = scalars.new_empty(len(STATE), live.count)
    for start, stop in chunks(live.count, size):
        _, logits = side.chunk(start, stop)
        state[:, start:stop] = kernels.statistics(logits, None, ids[start:stop], scalars, softcap, entropy)
        del logits  # freed before the next chunk's are allocated
    return live.spread(state)


def slope_chunks(
    hidden: Tensor,
    head: LinearHead,
    ids: Tensor,
    state: Tensor,
    slopes: Tensor,
    scalars: Tensor,
    softcap: float,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
    backend: str,
) -> HeadGradients:
    """Compute gradients from the STATE (7, N) and the SLOPES (3, N) of the rows, whose logits are formed again."""
    kernels, result, live = choice.load(backend), scalars.dtype, LiveRows.of(ids)
    size = chunk_size(live.count, row_bytes(head, result, 1, with_gradient=True), chunk_tokens)
    side, gradients = Side.of(hidden, head, live, size, result), HeadGradients(hidden, head, live, result, wanted)
    ids, state, slopes = live.take(ids), live.take(state), live.take(slopes)
    scale = fp16_scale(slopes) if head.weight.dtype == torch.float16 else None
    if scale is not None:
        slopes = slopes * scale
    for start, stop in chunks(live.count, size):
        x, logits = side.chunk(start, stop)
        kernels.apply(
            logits,
            None,
            ids[start:stop],
            state[:, start:stop].contiguous(),
            slopes[:, start:stop].contiguous(),
            scalars,
            softcap,
            logits,
        )
        gradients.add(start, stop, logits, x)
        del logits  # freed before the next chunk's are allocated
    if scale is not None:
        gradients.divide(scale, backend)
    return gradients
