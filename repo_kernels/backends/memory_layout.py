"""Where the rows of logits and of their gradient lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def row_strides(matrix: Tensor) -> tuple[int, int, int]:
    """Return (L, stride of b, stride of t) of (T, V) or (B, L, V) logits: flat row r is b = r // L, t = r % L."""
    if matrix.ndim == 2:
        return max(matrix.shape[0], 1), 0, matrix.stride(0)
    return max(matrix.shape[1], 1), matrix.stride(0), matrix.stride(1)


def gradient_layout(logits: Tensor) -> tuple[tuple[int, ...], int, int]:
    """Lay out the gradient of the logits: (strides, storage offset, elements of the storage).

    Its rows lie relative to 16-byte boundaries as the rows of the logits do: each stride is the smallest one with the
    same remainder. A kernel that starts a row of logits at its first boundary then meets the gradient's boundary too.
    """
    step = max(16 // logits.element_size(), 1)
    strides, reach = [1], logits.shape[-1]
    for size, stride in zip(reversed(logits.shape[:-1]), reversed(logits.stride()[:-1]), strict=True):
        strides.append(reach if logits.is_contiguous() else reach + (stride - reach) % step)
        reach = strides[-1] * max(size, 1)
    offset: int = logits.storage_offset() % step  # type: ignore[assignment]  # SymInt while tracing
    return tuple(reversed(strides)), offset, offset + reach


def gradient_buffer(logits: Tensor) -> Tensor:
    """Allocate dL/dlogits, uninitialised; contiguous if the logits are and begin at a 16-byte boundary."""
    if logits.is_contiguous() and logits.storage_offset() * logits.element_size() % 16 == 0:
        return torch.empty_like(logits)
    strides, offset, elements = gradient_layout(logits)
    return logits.new_empty(elements).as_strided(logits.shape, strides, offset)
