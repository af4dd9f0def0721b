"""How many rows of logits the linear losses form at a time, and the memory that this takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# On a CPU, logits that stay near the caches. On a GPU, what long GEMMs need: short chunks are bound by launches and by
# dL/dweight, which every chunk reads and writes.
CPU_BYTES = 64_000_000
GPU_BYTES = 1_000_000_000
GPU_ROWS = 1024
# The row stride of a chunk is an odd multiple of this many elements: rows are aligned for any V, and do not all fall
# into the same cache sets, as rows of 49 152 entries would.
ROW_STEP = 16


def row_stride(vocabulary: int) -> int:
    """Return the row stride of a chunk's logits, in elements."""
    return ROW_STEP * (-(-vocabulary // ROW_STEP) | 1)


@dataclass(frozen=True)
class HeadSizes:
    """What a linear loss computes for a head, as far as memory depends on it.

    Args:
        vocabulary, width: V and H.
        factors, result: dtypes of the factors and of the sums of the GEMMs.
        sides: 1, or 2 with the logits of a reference.
        with_gradient: whether there is a gradient of the logits. It lies over them unless its GEMMs take another dtype.
        with_weight: whether there is a gradient of the weight.
        rank: r of a low-rank part, whose factors get gradients where the logits do; 0 without one.
    """

    vocabulary: int
    width: int
    factors: torch.dtype
    result: torch.dtype
    sides: int = 1
    with_gradient: bool = True
    with_weight: bool = True
    rank: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes that one row of a chunk takes."""
        stride = row_stride(self.vocabulary)
        size, narrow = self.sides * stride * self.result.itemsize, self.factors != self.result
        if self.with_gradient:
            size += (stride * self.factors.itemsize if narrow else 0) + self.width * self.result.itemsize
        if self.rank:  # h A^T, its gradient, and h in the dtype of the sums
            size += (2 * self.rank + (self.width if narrow else 0)) * self.result.itemsize
        return size

    @property
    def weight_bytes(self) -> int:
        """Bytes of dL/dweight and of the gradients of a low-rank part in the sums' dtype; 0 if there are none."""
        low_rank = self.rank * (self.vocabulary + self.width) * self.with_gradient
        return (self.vocabulary * self.width * self.with_weight + low_rank) * self.result.itemsize

    def peak_bytes(self, live: int, rows: int) -> int:
        """Return the most bytes that a loss of `live` rows holds beside its inputs, in chunks of `rows` rows.

        That is one chunk, and the gradients of hidden states and head in the sums' dtype.
        """
        hidden = live * self.width * self.result.itemsize * self.with_gradient
        return rows * self.row_bytes + hidden + self.weight_bytes


@dataclass(frozen=True)
class Budget:
    """What bounds a chunk.

    Args:
        device: "cpu", "cuda", ...
        tokens: live rows per chunk, or None.
        size: bytes of the logits of a chunk and of their gradient, or None for the default: on a CPU 64 MB; elsewhere
            1 GB or twice dL/dweight, whichever is more, and at least 1024 rows.
        processes: P, among which the vocabulary is divided. They share the default, so that chunks are about as long
            as those of the whole head.
    """

    device: str
    tokens: int | None = None
    size: int | None = None
    processes: int = 1

    def rows(self, live: int, head: HeadSizes) -> int:
        """Return the rows per chunk, at least 1: as few chunks of `live` rows as the budget allows, equally long."""
        if self.tokens is not None:
            return max(1, min(self.tokens, live))
        size, least = self.size, 1
        if size is None and self.device == "cpu":
            size = CPU_BYTES // self.processes
        elif size is None:
            size, least = max(GPU_BYTES // self.processes, 2 * head.weight_bytes), GPU_ROWS
        most = max(least, size // head.row_bytes)
        return max(1, -(-live // max(1, -(-live // most))))
