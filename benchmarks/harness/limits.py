"""The limit that memory-bound work is compared with: the machine's own copy."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness.cases import Way
from benchmarks.harness.machine import device
from benchmarks.harness.results import LIMIT

HUGE_PAGE = 2 * 2**20
SIZE = 192 * 2**20  # bytes: far beyond any cache
PLACES = 4


def copy() -> dict[str, Way]:
    """Return PLACES ways that copy SIZE bytes, each between its own blocks of large pages, written before.

    On a virtual machine the time of the same copy differs by a factor of up to 1.7 with where its blocks lie. The best
    of them is the limit, so that a share of it depends neither on luck nor on what was in a cache.
    """
    blocks = [(_in_large_pages(), _in_large_pages()) for _ in range(PLACES)]

    def call(source: Tensor, target: Tensor) -> Callable[[], Tensor]:
        return lambda: target.copy_(source)

    copies = {f"copy of {SIZE >> 20} MiB, place {i + 1}": call(*pair) for i, pair in enumerate(blocks)}
    return {name: Way(copying, LIMIT, 2.0 * SIZE) for name, copying in copies.items()}


def device_copy(size: int) -> dict[str, Way]:
    """Return the copy of so many bytes on the device, which reads and writes each once; its first call allocates."""
    blocks = functools.cache(lambda: [torch.ones(size // 4, device=device()) for _ in range(2)])
    return {f"copy of {size >> 20} MiB": Way(lambda: blocks()[1].copy_(blocks()[0]), LIMIT, 2.0 * size)}


def _in_large_pages() -> Tensor:
    """Allocate (SIZE / 4,) fp32 in large pages and write it once."""
    block = torch.empty(SIZE + HUGE_PAGE, dtype=torch.int8, device=device())
    offset = -block.data_ptr() % HUGE_PAGE
    if block.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
        address, size = ctypes.c_void_p(block.data_ptr() + offset), ctypes.c_size_t(SIZE)
        ctypes.CDLL(None).madvise(address, size, mmap.MADV_HUGEPAGE)
    return block[offset : offset + SIZE].view(torch.float32).fill_(1)
