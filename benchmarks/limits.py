"""What the machine itself can do: the copy that memory-bound work is put beside."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Way
from benchmarks.machine import device
from benchmarks.results import LIMIT

HUGE_PAGE = 2 * 2**20
SIZE = 384 * 2**20  # bytes: far beyond any cache


def copy() -> dict[str, Way]:
    """The way that copies SIZE bytes between blocks in large pages that have been written before: the rate of DRAM at
    its best, so that a share of it depends neither on where the system happened to put a tensor nor on what of it was
    in a cache."""
    source, target = (_in_large_pages() for _ in range(2))
    call: Callable[[], Tensor] = lambda: target.copy_(source)  # noqa: E731
    return {f"copy of {SIZE >> 20} MiB": Way(call, LIMIT, 2.0 * SIZE)}


def _in_large_pages() -> Tensor:
    """(SIZE / 4,) fp32."""
    block = torch.empty(SIZE + HUGE_PAGE, dtype=torch.int8, device=device())
    offset = -block.data_ptr() % HUGE_PAGE
    if block.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
        address, size = ctypes.c_void_p(block.data_ptr() + offset), ctypes.c_size_t(SIZE)
        ctypes.CDLL(None).madvise(address, size, mmap.MADV_HUGEPAGE)
    return block[offset : offset + SIZE].view(torch.float32).fill_(1)
