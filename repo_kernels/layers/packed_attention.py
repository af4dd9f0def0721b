"""Causal attention over packed rows in fp32 on the CPU: one call of csrc/layers/attention.cpp for all sequences.

PyTorch's SDPA takes sequences of one length at a time, and spends most of its time outside the products if they are
short. The bits of a sequence depend neither on its neighbours nor on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.cpu import layers as cpu

COLUMNS = 16  # the head dimension is a multiple of this


def available(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether `attention` takes heads of this dimension on this device and in this dtype."""
    return cpu.available() and device.type == "cpu" and dtype == torch.float32 and head_dim % COLUMNS == 0


def attention(
    q: Tensor, k: Tensor, v: Tensor, query_bounds: Tensor, key_bounds: Tensor, scale: float, window: int | None
) -> Tensor:
    """Compute causal attention within segments, differentiable in q, k and v.

    Args:
        q: (T, Hq, D), fp32.
        k, v: (K, Hk, D), fp32, Hk a divisor of Hq.
        query_bounds, key_bounds: (S + 1,) int32, the segments' bounds in T and in K. The last query of a segment is
            aligned to its last key; a segment has at least as many keys as queries.
        scale: factor of the scores.
        window: a query sees at most so many of the latest keys; None for all.

    Returns:
        (T, Hq, D).
    """
    out: Tensor = PackedAttention.apply(q, k, v, query_bounds, key_bounds, scale, window or 2**31)
    return out


class PackedAttention(torch.autograd.Function):
    """`attention` with an int for the window."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, query_bounds: Tensor, key_bounds: Tensor, scale: float, window: int
    ) -> Tensor:
        q, k, v = (cpu.unit_columns(x) for x in (q, k, v))
        out, log2_sums = cpu.attention(q, k, v, query_bounds, key_bounds, scale, window)
        ctx.save_for_backward(q, k, v, query_bounds, key_bounds, log2_sums)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, query_bounds, key_bounds, log2_sums = ctx.saved_tensors
        bounds = query_bounds, key_bounds, ctx.scale, ctx.window
        gradients = cpu.attention_gradient(q, k, v, *bounds, cpu.unit_columns(grad), log2_sums)
        return *gradients, None, None, None, None
