"""Attention of one new token per row over a static cache, with grouped heads, without copies and without a mask.

In Triton one launch serves every length, so that a CUDA graph of it stays valid: the kernel reads the current column
from device memory and takes no other columns. In PyTorch it is the definition, and repeats keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.choice import KERNEL_DTYPES, TRITON_INSTALLED
from ..checks import describe
from .decode_backend import triton_launches, usable

__all__ = ["decode_attention", "why_eager"]


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    column: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attend from the newest token of each row to the columns of a cache that the row sees.

    Row i sees the columns from starts[i] to column[0], both included, or the last `window` of them. The scores
    q . k * scale become softcap * tanh(score / softcap) if there is a softcap.

    Args:
        query: (rows, Hq, D), fp32, bf16 or fp16.
        keys, values: (rows, Hk, length, D) contiguous, of the query's dtype; Hq is a multiple of Hk, and heads of
            queries that share a head of keys are adjacent.
        starts: (rows,) int64. A row that starts after the column gets zeros.
        column: (1,) int64, below length.
        scale: of the scores.
        window: columns that are seen at most; None for all.
        softcap: 0 for none.
        backend: "triton", "eager", or None for Triton where it can be used.

    Returns:
        (rows, Hq, D) in the query's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend cannot be used.
    """
    _check(query, keys, values, starts, column)
    if not usable(backend, query, why_eager(query, keys, values)):
        return _eager(query, keys, values, starts, column, scale, window, softcap)
    return triton_launches().attend(query.contiguous(), keys, values, starts, column, scale, window, softcap)


def why_eager(query: Tensor, keys: Tensor, values: Tensor) -> str:
    """Return why the Triton kernel does not take these tensors (arguments of decode_attention), "" if it does."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if query.dtype not in KERNEL_DTYPES:
        return f"the attention kernel takes float32, bfloat16 or float16, not {query.dtype}"
    if not 16 <= query.shape[-1] <= 256 or query.shape[-1] * query.element_size() % 16:
        return f"the attention kernel takes heads of 16 to 256 columns in pieces of 16 bytes, not {query.shape[-1]}"
    if not keys.is_contiguous() or not values.is_contiguous() or (keys.data_ptr() | values.data_ptr()) % 16:
        return "keys and values are not contiguous from a boundary of 16 bytes on"
    return ""


def _check(query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, column: Tensor) -> None:
    """Raise ValueError unless shapes and dtypes fit."""
    rows, heads, columns = query.shape
    if keys.shape != values.shape or keys.ndim != 4 or (keys.shape[0], keys.shape[3]) != (rows, columns):
        raise ValueError(
            f"keys and values must be (rows, key heads, length, D) with the rows and D of query {tuple(query.shape)}; "
            f"got {describe(keys)} and {describe(values)}"
        )
    if heads % keys.shape[1]:
        raise ValueError(f"query must have a multiple of {keys.shape[1]} key heads; got {heads} heads")
    if query.dtype != keys.dtype or keys.dtype != values.dtype:
        raise ValueError(f"query, keys and values must have one dtype; got {[t.dtype for t in (query, keys, values)]}")
    if starts.shape != (rows,) or column.shape != (1,) or {starts.dtype, column.dtype} != {torch.int64}:
        raise ValueError(f"starts ({rows},) and column (1,) must be int64; got {describe(starts)}, {describe(column)}")


def _eager(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, column: Tensor, scale: float, window: int | None,
    softcap: float,
) -> Tensor:  # fmt: skip
    """Compute decode_attention in PyTorch; in fp64 if the query is."""
    group = query.shape[1] // keys.shape[1]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    k, v = (x.to(wide).repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("rhd,rhld->rhl", query.to(wide), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    places = torch.arange(keys.shape[2], device=keys.device)
    first = starts if window is None else torch.maximum(starts, column + 1 - window)
    seen = (places >= first[:, None]) & (places <= column)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    weights = weights.masked_fill(~seen.any(-1)[:, None, None], 0.0)
    return torch.einsum("rhl,rhld->rhd", weights, v).to(query.dtype)
