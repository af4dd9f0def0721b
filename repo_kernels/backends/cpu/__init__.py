"""The C++ backend: repo_kernels/eager.py over rows in memory, and what a transformer does between its matrix products,
compiled from csrc/ into the module repo_kernels._cpu.

Three sets of kernels (AVX-512, AVX2 with FMA, and plain vectors), chosen once for the machine. Each row is read from
memory once and its gradient is written past the caches; a row's bits do not depend on the number of threads
(torch.get_num_threads()) nor on the rows around it. Where the extension was not built `available` is False.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..interface import ENTROPY_NONE, IGNORED, KL_FULL, STATE, TOKENS, Code, LossRows
from . import memory

try:
    from ... import _cpu
except ImportError:  # built with REPO_KERNELS_CPU=OFF, or not at all
    _cpu = None  # type: ignore[assignment]


def available() -> bool:
    """Whether the extension was built."""
    return _cpu is not None


def new_gradient(logits: Tensor, ids: Tensor) -> tuple[Tensor, bool]:
    """A gradient for logits whose rows have these ids, and whether it holds zeros."""
    return memory.new_gradient(logits, int((ids == IGNORED).sum()))


def fused(
    logits: Tensor, ref_logits: Tensor | None, rows: LossRows, grad: Tensor | None, zeroed: bool = False
) -> tuple[Tensor, Tensor]:
    """Weighted loss of each row, (N,), and its TOKENS, (13, N); dL/dlogits times grad_scale goes into `grad`.

    logits, ref_logits: (T, V) or (B, L, V), any strides of the rows. grad: like logits, or the logits themselves, or
    None. zeroed: grad holds zeros, and dead rows are left alone. Raises IndexError, before anything is written, where
    the id of a live row is outside [0, V).
    """
    count = rows.ids.numel()
    losses, tokens = rows.values.new_empty(count), rows.values.new_empty(len(TOKENS), count)
    if Code.unpack(rows.code).kl != KL_FULL:
        ref_logits = None
    _cpu.fused(
        logits.detach(),
        None if ref_logits is None else ref_logits.detach(),
        None if grad is None else grad.detach(),
        zeroed,
        rows.ids.contiguous(),
        rows.values.contiguous(),
        rows.scalars,
        rows.code,
        rows.softcap,
        rows.entropy != ENTROPY_NONE,
        losses,
        tokens,
        torch.get_num_threads(),
    )
    return losses, tokens


def statistics(
    logits: Tensor, ref_logits: Tensor | None, ids: Tensor, scalars: Tensor, softcap: float, entropy: int
) -> Tensor:
    """The STATE of each row, (7, N): log-probability of its id, entropy, full KL, and what `apply` starts from."""
    state = scalars.new_empty(len(STATE), ids.numel())
    _cpu.statistics(
        logits.detach(),
        None if ref_logits is None else ref_logits.detach(),
        ids.contiguous(),
        scalars,
        softcap,
        entropy != ENTROPY_NONE,
        state,
        torch.get_num_threads(),
    )
    return state


def apply(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor,
    state: Tensor,
    slopes: Tensor,
    scalars: Tensor,
    softcap: float,
    grad: Tensor,
    zeroed: bool = False,
) -> None:
    """dL/dlogits into `grad`, from the STATE (7, N) of the rows and their SLOPES (3, N)."""
    _cpu.apply(
        logits.detach(),
        None if ref_logits is None else ref_logits.detach(),
        grad.detach(),
        zeroed,
        ids.contiguous(),
        state.detach().contiguous(),
        slopes.contiguous(),
        scalars,
        softcap,
        torch.get_num_threads(),
    )


def scale_rows(grad: Tensor, upstream: Tensor) -> None:
    """Multiply each row of `grad` by its entry of `upstream` (N,), in place; rows whose entry is 1 are not touched."""
    _cpu.scale_rows(grad.detach(), upstream.detach(), torch.get_num_threads())


def transposed(matrix: Tensor) -> Tensor:
    """A contiguous (c, r) copy of an fp32 matrix (r, c) with unit column stride."""
    out = matrix.new_empty(matrix.shape[1], matrix.shape[0])
    _cpu.transpose(matrix.detach(), out, torch.get_num_threads())
    return out


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """weight x / rms(x) of the rows of a contiguous fp32 tensor (..., c), and 1 / rms of each, (rows,).

    rms(x)^2 = mean(x^2) + epsilon.
    """
    y, rows = torch.empty_like(x), x.detach().view(-1, x.shape[-1])
    inverse = x.new_empty(len(rows))
    _cpu.rms_norm(rows, weight.detach(), y.view_as(rows), inverse, epsilon, torch.get_num_threads())
    return y, inverse


def rms_norm_gradient(
    x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor, with_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and, with_weight, of the weight; grad: contiguous, like x."""
    of_x, of_weight = torch.empty_like(x), torch.empty_like(weight) if with_weight else None
    rows, threads = x.detach().view(-1, x.shape[-1]), torch.get_num_threads()
    by_row = grad.detach().view_as(rows), of_x.view_as(rows)
    _cpu.rms_norm_gradient(rows, weight.detach(), inverse, *by_row, of_weight, threads)
    return of_x, of_weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of contiguous fp32 tensors of one shape."""
    out = torch.empty_like(gate)
    _cpu.swiglu(gate.detach(), up.detach(), out, torch.get_num_threads())
    return out


def swiglu_gradient(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; grad: contiguous, like them."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _cpu.swiglu_gradient(gate.detach(), up.detach(), grad.detach(), of_gate, of_up, torch.get_num_threads())
    return of_gate, of_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x cos + rotate_half(x) sin, or the transposed map, with x's strides. x: (B, heads, T, D); cos, sin: (B, 1, T, D);
    fp32; x is copied unless its last stride is 1, which that of cos and sin is."""
    x = unit_columns(x)
    out = torch.empty_like(x)
    _cpu.rotate(x.detach(), cos.detach(), sin.detach(), out, back, torch.get_num_threads())
    return out


def unit_columns(x: Tensor) -> Tensor:
    """x, copied unless its last stride is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def attention(
    q: Tensor, k: Tensor, v: Tensor, query_bounds: Tensor, key_bounds: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Causal attention by segments, (T, Hq, D), and the logarithms to base 2 of its denominators, (Hq, T)."""
    out, log2_sums = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0])
    inputs = q.detach(), k.detach(), v.detach(), query_bounds, key_bounds, scale, window
    _cpu.attention(*inputs, out, log2_sums, torch.get_num_threads())
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
    """Gradients of q, k and v."""
    of_q, of_k, of_v = (x.new_empty(x.shape) for x in (q, k, v))
    inputs = q.detach(), k.detach(), v.detach(), query_bounds, key_bounds, scale, window
    _cpu.attention_gradient(*inputs, grad.detach(), log2_sums, of_q, of_k, of_v, torch.get_num_threads())
    return of_q, of_k, of_v
