"""The layer kernels of the C++ backend: what a transformer computes between its matrix products, in fp32.

`repo_kernels.layers` adds autograd and the checks of shapes and types. Gradients are named after their tensor:
`d_gate` is dL/dgate. On "meta" tensors the results are allocated and nothing is computed, as with PyTorch's operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .extension import _cpu, available

__all__ = [
    "add_inner",
    "add_outer",
    "attention",
    "attention_gradient",
    "available",
    "rms_norm",
    "rms_norm_gradient",
    "rotate",
    "swiglu",
    "swiglu_gradient",
    "transposed",
    "unit_columns",
]


def _run(kernel: Callable[..., None], *arguments: Any) -> None:
    """Call a kernel of the extension, which writes its results into its arguments."""
    if not arguments[0].is_meta:
        kernel(*arguments)


def transposed(matrix: Tensor) -> Tensor:
    """Copy an fp32 matrix (r, c) with unit column stride into a contiguous (c, r) one."""
    out = matrix.new_empty(matrix.shape[1], matrix.shape[0])
    _run(_cpu.transpose, matrix.detach(), out, torch.get_num_threads())
    return out


def add_outer(z: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out += z @ b^T in fp32. z (n, r), b (m, r): contiguous; out: (n, m), unit column stride."""
    _run(_cpu.add_outer, out.detach(), z.detach(), b.detach(), torch.get_num_threads())


def add_inner(d: Tensor, z: Tensor, out: Tensor) -> None:
    """Compute out += d^T @ z in fp32. d: (n, m), unit column stride; z (n, r), out (m, r): contiguous."""
    _run(_cpu.add_inner, d.detach(), z.detach(), out.detach(), torch.get_num_threads())


def unit_columns(x: Tensor) -> Tensor:
    """Return x, copied unless its last stride is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Compute weight * x * r with r = (mean(x^2) + epsilon)^(-1/2) over the last dimension.

    Args:
        x: (..., c), contiguous fp32.
        weight: (c,), contiguous fp32.
        epsilon: added to the mean square.

    Returns:
        The result, shaped like x, and r of each row, (rows,), which `rms_norm_gradient` takes.
    """
    y, rows = torch.empty_like(x), x.detach().view(-1, x.shape[-1])
    inverse = x.new_empty(len(rows))
    _run(_cpu.rms_norm, rows, weight.detach(), y.view_as(rows), inverse, epsilon, torch.get_num_threads())
    return y, inverse


def rms_norm_gradient(
    x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor, with_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute dL/dx and, if `with_weight`, dL/dweight. grad: dL/dy, contiguous, shaped like x."""
    d_x, d_weight = torch.empty_like(x), torch.empty_like(weight) if with_weight else None
    rows, threads = x.detach().view(-1, x.shape[-1]), torch.get_num_threads()
    by_row = grad.detach().view_as(rows), d_x.view_as(rows)
    _run(_cpu.rms_norm_gradient, rows, weight.detach(), inverse, *by_row, d_weight, threads)
    return d_x, d_weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up of two contiguous fp32 tensors of one shape."""
    out = torch.empty_like(gate)
    _run(_cpu.swiglu, gate.detach(), up.detach(), out, torch.get_num_threads())
    return out


def swiglu_gradient(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (dL/dgate, dL/dup). grad: dL/dout, contiguous, shaped like gate."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _run(_cpu.swiglu_gradient, gate.detach(), up.detach(), grad.detach(), d_gate, d_up, torch.get_num_threads())
    return d_gate, d_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:
    """Compute x * cos + rotate_half(x) * sin, or its transpose, which the backward needs.

    Args:
        x: (B, heads, T, D), fp32; copied unless its last stride is 1.
        cos, sin: (B, 1, T, D), fp32, last stride 1.
        transpose: apply the transposed linear map.

    Returns:
        A tensor with the shape and the strides of x.
    """
    x = unit_columns(x)
    out = torch.empty_like(x)
    _run(_cpu.rotate, x.detach(), cos.detach(), sin.detach(), out, transpose, torch.get_num_threads())
    return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, query_bounds: Tensor, key_bounds: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Compute causal attention within segments of packed rows.

    Args:
        q: (T, Hq, D); k, v: (K, Hk, D), Hk a divisor of Hq; fp32, last stride 1, D a multiple of 16.
        query_bounds, key_bounds: (S + 1,) int32, the segments' bounds in T and in K.
        scale: factor of the scores.
        window: how many of the latest keys a query sees.

    Returns:
        The output (T, Hq, D) and the base-2 logarithms of the softmax denominators, (Hq, T), which
        `attention_gradient` takes.
    """
    out, log2_sums = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0])
    inputs = q.detach(), k.detach(), v.detach(), query_bounds, key_bounds, scale, window
    _run(_cpu.attention, *inputs, out, log2_sums, torch.get_num_threads())
    return out, log2_sums


def attention_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    scale: float,
    window: int,
    grad: Tensor,
    log2_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dL/dq, dL/dk and dL/dv from dL/dout (T, Hq, D) and the forward's log2_sums (Hq, T)."""
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    inputs = q.detach(), k.detach(), v.detach(), query_bounds, key_bounds, scale, window
    _run(_cpu.attention_gradient, *inputs, grad.detach(), log2_sums, d_q, d_k, d_v, torch.get_num_threads())
    return d_q, d_k, d_v
