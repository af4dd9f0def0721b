"""The parts of a Llama-shaped layer between its matrix products, for one new token per row: one launch each in Triton.

In PyTorch, rounded as the kernels round: each computes in fp32 and rounds its result once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..backends.choice import TRITON_INSTALLED
from .decode_backend import triton_launches, usable

COLUMNS = 16  # widths and head dimensions are multiples of this, so that rows begin at boundaries of 16 bytes


def add_norm(
    hidden: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    backend: str | None = None,
) -> Tensor:
    """Add `delta` to the hidden states, in place, and return their RMSNorm.

    Args:
        hidden: (rows, H) contiguous; overwritten by the sum.
        delta: (rows, H) contiguous, or None to leave the hidden states as they are.
        weight: (H,).
        epsilon: added to the mean square.
        dtype: of the result.
        backend: "triton", "eager", or None for Triton on a GPU.

    Returns:
        hidden / sqrt(mean(hidden^2) + epsilon) * weight, (rows, H).
    """
    if usable(backend, hidden, _why_eager(hidden.shape[1])):
        return triton_launches().add_norm(hidden, delta, weight, epsilon, dtype)
    if delta is not None:
        hidden.copy_(hidden.float() + delta.float())
    return _normalised(hidden, weight, epsilon).to(dtype)


def place_heads(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    column: Tensor,
    heads: int,
    epsilon: float,
    backend: str | None = None,
) -> Tensor:
    """Rotate queries and keys, write keys and values into their column of the cache, and return the queries.

    Args:
        qkv: (rows, (heads + 2 Hk) D) contiguous: queries, keys and values of each row.
        cos, sin: (rows, D), of the rotary embedding; the second half of a head is turned against the first.
        norms: weights (D,) of RMSNorms on each head of queries and of keys before the rotation, or None.
        keys, values: (rows, Hk, length, D), of the dtype of qkv; written.
        column: (1,) int64, the column to write.
        heads: of queries.
        epsilon: of the norms.
        backend: "triton", "eager", or None for Triton on a GPU.

    Returns:
        The queries (rows, heads, D).
    """
    if usable(backend, qkv, _why_eager(keys.shape[3])):
        return triton_launches().place_heads(qkv, cos, sin, norms, keys, values, column, heads, epsilon)
    key_heads, columns = keys.shape[1], keys.shape[3]
    query, key, value = qkv.view(len(qkv), -1, columns).split([heads, key_heads, key_heads], 1)
    if norms is not None:
        query, key = (_normalised(x, weight, epsilon) for x, weight in zip((query, key), norms, strict=True))
    query, key = (_rotated(x.float(), cos.float()[:, None], sin.float()[:, None]) for x in (query, key))
    for buffer, states in ((keys, key), (values, value)):
        buffer.index_copy_(2, column, states[:, :, None].to(buffer.dtype))
    return query.to(qkv.dtype)


def gate(gate_up: Tensor, backend: str | None = None) -> Tensor:
    """Return silu(gate) * up of gate_up (rows, 2 I) contiguous, whose halves they are: (rows, I).

    backend: "triton", "eager", or None for Triton on a GPU.
    """
    if usable(backend, gate_up, _why_eager(gate_up.shape[1] // 2)):
        return triton_launches().gate(gate_up)
    gates, up = gate_up.float().chunk(2, -1)
    return (silu(gates) * up).to(gate_up.dtype)


def _why_eager(width: int) -> str:
    """Return why the Triton kernels do not take rows of this width, "" if they do."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    return f"rows must have a multiple of {COLUMNS} columns; got {width}" if width % COLUMNS else ""


def _normalised(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return the RMSNorm over the last dimension, fp32."""
    x = x.float()
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (..., D) turned by the rotary embedding."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
