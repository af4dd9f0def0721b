"""Products of hidden states with some rows of a head: the logits of the kept tokens of each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ...backends.interface import compute_dtype
from ...tensor_kinds import kept, written
from ..autograd import refuse_second_order
from .chunks import CPU_BYTES, GPU_BYTES


@custom_op("repo_kernels::kept_products", mutates_args=())
def kept_products(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
    chunk_bytes: int | None,
) -> Tensor:
    """Compute hidden[n] @ weight[index[n, k]] + bias[index[n, k]], gathered a few rows at a time.

    Args:
        hidden: (N, H). weight: (V, H). bias: (V,) or None.
        index: (N, K) int64; -1 where there is none. Hidden states of rows without any are not read.
        wanted: which of hidden, weight and bias get a gradient.
        chunk_tokens: rows of a chunk, or None. chunk_bytes: bytes that the gathered rows of the weight may take; None:
            64 MB on the CPU, 1 GB elsewhere.

    Returns:
        (N, K), compute dtype of hidden; of no meaning where index is -1.
    """
    result = compute_dtype(hidden)
    out = hidden.new_empty(index.shape, dtype=result)
    for part in _parts(index, weight.shape[1] * result.itemsize, chunk_tokens, chunk_bytes):
        x, rows = _factors(hidden[part], weight, index[part], result)
        torch.bmm(rows, x[:, :, None], out=out[part][:, :, None])
        if bias is not None:
            out[part] += bias[index[part].clamp_min(0)].to(result)
    return out


@kept_products.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(index.shape, dtype=compute_dtype(hidden))


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    hidden, weight, bias, index, wanted, *rest = inputs
    ctx.dtypes = [x.dtype if want else None for x, want in zip((hidden, weight, bias), wanted, strict=True)]
    ctx.rest = list(wanted), *rest
    ctx.save_for_backward(*map(kept, (hidden, weight, index)))


def _backward(ctx: Any, upstream: Tensor) -> tuple:
    hidden, weight, index = (x.detach() for x in ctx.saved_tensors)
    if type(upstream) is Tensor:  # not traced
        refuse_second_order("a loss of kept tokens")
    totals = kept_products_gradient(upstream, hidden, weight, index, *ctx.rest)
    rounded = (None if dtype is None else x.to(dtype) for x, dtype in zip(totals, ctx.dtypes, strict=True))
    return *rounded, None, None, None, None


kept_products.register_autograd(_backward, setup_context=_keep)


@custom_op("repo_kernels::kept_products_gradient", mutates_args=())
def kept_products_gradient(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    wanted: Sequence[bool],
    chunk_tokens: int | None,
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of hidden, weight and bias from that of the products, (N, K), which is 0 where index is -1.

    A gradient that is not wanted is empty.
    """
    result = upstream.dtype
    slopes = written(upstream)
    totals = _allocate(hidden, weight, wanted, result)
    for part in _parts(index, 2 * weight.shape[1] * result.itemsize, chunk_tokens, chunk_bytes):
        x, rows = _factors(hidden[part], weight, index[part], result)
        if wanted[0]:
            torch.bmm(slopes[part][:, None], rows, out=totals[0][part][:, None])
        if wanted[1]:
            _add_rows(totals[1], index[part], slopes[part][:, :, None] * x[:, None])
    if wanted[2]:
        _add_rows(totals[2], index, slopes)
    return totals


@kept_products_gradient.register_fake
def _(
    upstream: Tensor, hidden: Tensor, weight: Tensor, index: Tensor, wanted: Sequence[bool], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(hidden, weight, wanted, upstream.dtype)


def _parts(index: Tensor, entry_bytes: int, chunk_tokens: int | None, chunk_bytes: int | None) -> Iterator[slice]:
    """Cut the rows into chunks of which each takes chunk_bytes, with entry_bytes for each kept token."""
    size = chunk_bytes or (CPU_BYTES if index.device.type == "cpu" else GPU_BYTES)
    step = chunk_tokens or max(1, size // max(1, index.shape[1] * entry_bytes))
    for start in range(0, index.shape[0], step):
        yield slice(start, start + step)


def _factors(hidden: Tensor, weight: Tensor, index: Tensor, result: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return hidden states (c, H), 0 in rows without a kept token, and the gathered rows of the weight (c, K, H)."""
    x = torch.where((index >= 0).any(-1, keepdim=True), hidden, 0.0).to(result)
    rows = weight.index_select(0, index.clamp_min(0).reshape(-1)).to(result)
    return x, rows.view(*index.shape, weight.shape[1])


def _allocate(
    hidden: Tensor, weight: Tensor, wanted: Sequence[bool], result: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    grad_hidden, grad_weight, grad_bias = (
        weight.new_zeros(shape if want else (0,), dtype=result) for shape, want in zip(shapes, wanted, strict=True)
    )
    return grad_hidden, grad_weight, grad_bias


def _add_rows(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Add values (c, K, ...) to the rows of `total` that the index (c, K) names, in a fixed order."""
    where, rows = index.clamp_min(0).reshape(-1), values.flatten(0, 1)
    if total.device.type == "cpu":
        total.index_add_(0, where, rows)
    else:  # index_add_ adds in any order there, and this sorts
        total.index_put_((where,), rows, accumulate=True)
