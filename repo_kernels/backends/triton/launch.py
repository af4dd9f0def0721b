"""Launches of the kernels: which variant runs, with which grid and arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..interface import ENTROPY_NONE, SLOPES, STATE, TOKENS, LossRows, gradient_buffer, gradient_layout, row_strides
from .variants import Variant, apply_variant, fused_variant, scale_variant, statistics_variant

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def warp_size() -> int:
    """Return the threads per warp of the GPU that Triton compiles for here: 64 on AMD, 32 otherwise."""
    return 64 if torch.version.hip else 32


def launch(variant: Variant, count: int, *args: Any) -> None:
    """Launch one program per row on the device of the first argument; nothing without rows."""
    if count:
        with torch.cuda.device_of(args[0]):
            variant.kernel[(count,)](*args, **variant.constexprs, **variant.options)


def phase(matrix: Tensor) -> tuple[int, ...]:
    """Return how rows lie relative to 16-byte boundaries: remainders of the base and of the strides that count."""
    strides = [s for s, n in zip(matrix.stride()[:-1], matrix.shape[:-1], strict=True) if n > 1]
    return matrix.data_ptr() % 16, *(s * matrix.element_size() % 16 for s in strides)


def in_phase(matrix: Tensor, logits: Tensor) -> Tensor:
    """Return `matrix`, or a copy of it whose rows lie relative to 16-byte boundaries as the rows of the logits do.

    A kernel splits a row and its gradient or reference at the same columns, which is possible only if they lie alike.
    Copies are rare: logits and reference logits of one shape, straight from their heads, lie alike.
    """
    if phase(matrix) == phase(logits):
        return matrix
    return empty_in_phase(logits).copy_(matrix)


def empty_in_phase(logits: Tensor) -> Tensor:
    """Allocate a tensor of the logits' shape that is in phase with them, also if their base is not aligned."""
    buffer = gradient_buffer(logits)
    if phase(buffer) == phase(logits):
        return buffer
    strides, _, elements = gradient_layout(logits)
    step = 16 // logits.element_size()
    base = logits.new_empty(elements + step)
    offset = (logits.data_ptr() - base.data_ptr()) // logits.element_size() % step
    return base.as_strided(logits.shape, strides, offset)


def new_gradient(logits: Tensor, ids: Tensor) -> tuple[Tensor, bool]:
    """Allocate dL/dlogits in phase with the logits; False: it is not filled with zeros."""
    return gradient_buffer(logits), False


def fused(
    logits: Tensor, ref_logits: Tensor | None, rows: LossRows, grad: Tensor | None, zeroed: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute losses (N,) and TOKENS (13, N), and write dL/dlogits times grad_scale into `grad` if it is given."""
    count, columns = rows.ids.shape[0], logits.shape[-1]
    full_kl = ref_logits is not None
    losses, tokens = rows.values.new_empty(count), rows.values.new_empty(len(TOKENS), count)
    ref = logits if ref_logits is None else in_phase(ref_logits, logits)
    out = logits if grad is None else grad if phase(grad) == phase(logits) else empty_in_phase(logits)
    variant = fused_variant(DTYPES[logits.dtype], columns, rows.entropy, rows.softcap != 0, full_kl, warp_size())
    length, *strides = row_strides(logits)
    launch(
        variant, count, logits, ref, out, rows.ids, rows.values, rows.scalars, losses, tokens, count, length, *strides,
        *row_strides(ref)[1:], *row_strides(out)[1:], columns, rows.code, rows.softcap, rows.entropy, int(grad is not None),
    )  # fmt: skip
    if grad is not None and out is not grad:
        grad.copy_(out)
    return losses, tokens


def statistics(
    logits: Tensor, ref_logits: Tensor | None, ids: Tensor, scalars: Tensor, softcap: float, entropy: int
) -> Tensor:
    """Compute the STATE (7, N) of the rows; 0 on dead rows."""
    count, columns = ids.shape[0], logits.shape[-1]
    state = scalars.new_empty(len(STATE), count)
    ref = logits if ref_logits is None else in_phase(ref_logits, logits)
    variant = statistics_variant(
        DTYPES[logits.dtype], entropy != ENTROPY_NONE, softcap != 0, ref_logits is not None, warp_size()
    )
    length, *strides = row_strides(logits)
    launch(
        variant, count, logits, ref, ids, scalars, state, count, length, *strides, *row_strides(ref)[1:], columns,
        softcap, entropy,
    )  # fmt: skip
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
    """Write dL/dlogits into `grad`, which may be the logits, from the STATE (7, N) and the SLOPES (3, N)."""
    assert slopes.shape == (len(SLOPES), ids.shape[0])
    ref = logits if ref_logits is None else in_phase(ref_logits, logits)
    out = grad if phase(grad) == phase(logits) else empty_in_phase(logits)
    variant = apply_variant(DTYPES[logits.dtype], softcap != 0, ref_logits is not None, warp_size())
    length, *strides = row_strides(logits)
    launch(
        variant, ids.shape[0], logits, ref, out, ids, state, slopes.contiguous(), scalars, ids.shape[0], length,
        *strides, *row_strides(ref)[1:], *row_strides(out)[1:], logits.shape[-1], softcap,
    )  # fmt: skip
    if out is not grad:
        grad.copy_(out)


def scale_rows(grad: Tensor, upstream: Tensor) -> None:
    """Multiply each row of `grad` by its entry of `upstream` (N,), any stride, in place, with one rounding.

    A row whose factor is 1 is not touched.
    """
    length, *strides = row_strides(grad)
    launch(
        scale_variant(DTYPES[grad.dtype], warp_size()), upstream.shape[0], grad, upstream, upstream.stride(0), length,
        *strides, grad.shape[-1],
    )  # fmt: skip
