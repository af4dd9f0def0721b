"""Causal attention over packed rows in fp32 on the CPU, by csrc/attention.cpp: one call for all sequences.

PyTorch's SDPA takes sequences of one length at a time, and for short ones most of its time is not products. The bits of
a sequence do not depend on its neighbours nor on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.cpu import layers as cpu

COLUMNS = 16  # a head has a multiple of these


def available(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `attention` takes heads of this size there."""
    return cpu.available() and device.type == "cpu" and dtype == torch.float32 and head_dim % COLUMNS == 0


def attention(
    q: Tensor, k: Tensor, v: Tensor, query_bounds: Tensor, key_bounds: Tensor, scale: float, window: int | None
) -> Tensor:
    """q (T, Hq, D), k, v (K, Hk, D) -> (T, Hq, D). bounds: (S + 1,) int32; each of the S segments of queries sees its
    keys alone, causally, its last query aligned to its last key, and only the last `window` of them."""
    out: Tensor = PackedAttention.apply(q, k, v, query_bounds, key_bounds, scale, window or 2**31)
    return out


class PackedAttention(torch.autograd.Function):
    """`attention`, with a number for every window."""

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
        found = cpu.attention_gradient(q, k, v, *bounds, cpu.unit_columns(grad), log2_sums)
        return *found, None, None, None, None
