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


def row_bytes(
    vocabulary: int, width: int, factors: torch.dtype, result: torch.dtype, sides: int, with_gradient: bool
) -> int:
    """Return the bytes that one row of a chunk takes.

    Args:
        vocabulary, width: V and H.
        factors, result: dtypes of the factors and of the sums of the GEMMs.
        sides: 1, or 2 with the logits of a reference.
        with_gradient: whether there is a gradient of the logits. It lies over them unless its GEMMs take another dtype.
    """
    size = sides * row_stride(vocabulary) * result.itemsize
    if with_gradient:
        narrow = row_stride(vocabulary) * factors.itemsize if factors != result else 0
        size += narrow + width * result.itemsize
    return size


@dataclass(frozen=True)
class Budget:
    """What bounds a chunk.

    Args:
        device: "cpu", "cuda", ...
        tokens: live rows per chunk, or None.
        size: bytes of the logits of a chunk and of their gradient, or None for the default: 64 MB on a CPU; elsewhere
            1 GB or twice dL/dweight, whichever is more, and at least 1024 rows.
    """

    device: str
    tokens: int | None = None
    size: int | None = None

    def rows(
        self,
        live: int,
        vocabulary: int,
        width: int,
        factors: torch.dtype,
        result: torch.dtype,
        sides: int,
        with_gradient: bool,
        with_weight: bool,
    ) -> int:
        """Return the rows per chunk, at least 1: as few chunks as the budget allows, equally long.

        Args:
            live: number of live rows.
            with_weight: whether dL/dweight is computed.
            vocabulary, width, factors, result, sides, with_gradient: as in `row_bytes`.
        """
        if self.tokens is not None:
            return max(1, min(self.tokens, live))
        size, least = self.size, 1
        if size is None and self.device == "cpu":
            size = CPU_BYTES
        elif size is None:
            size = max(GPU_BYTES, 2 * vocabulary * width * result.itemsize * with_weight)
            least = GPU_ROWS
        most = max(least, size // row_bytes(vocabulary, width, factors, result, sides, with_gradient))
        return max(1, -(-live // max(1, -(-live // most))))
