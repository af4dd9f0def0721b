"""Memory for gradients on the CPU.

A page that the operating system hands out costs more time than the kernel that fills it.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from ..interface import RowArguments
from ..memory_layout import gradient_buffer, gradient_layout
from .extension import _cpu

LARGE = 4 << 20  # bytes; the allocator keeps the pages of smaller blocks


class Spare:
    """One block of memory, handed out again once nobody holds a tensor on it.

    A training step then does not wait for the system to clear the pages of its gradient. The block is kept between
    steps.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block = np.empty(0, dtype=np.uint8)
        self._user: weakref.ref[np.ndarray] | None = None

    def take(self, size: int) -> Tensor:
        """Return (size,) uint8, uninitialised: the block if it is free and large enough, else a new one."""
        with self._lock:
            taken = self._user is not None and self._user() is not None
            if taken or self._block.nbytes < size:
                self._block = np.empty(size, dtype=np.uint8)
            view = self._block[:size]
            self._user = weakref.ref(view)  # alive as long as the storage of the tensor
        return torch.from_numpy(view)


_spare = Spare()


def new_gradient(logits: Tensor, arguments: RowArguments | None) -> tuple[Tensor, bool]:
    """Allocate dL/dlogits; the flag says whether it is filled with zeros.

    If most rows are dead, it is made of zero pages, which exist only once they are written: dead rows cost nothing.

    Args:
        logits: (T, V) or (B, L, V).
        arguments: whose ids and mask say which rows are dead; None: not known.
    """
    if logits.numel() * logits.element_size() < LARGE:
        return gradient_buffer(logits), False
    rows = logits.shape[:-1].numel()
    strides, offset, elements = gradient_layout(logits)
    size = elements * logits.element_size()
    mostly_dead = arguments is not None and 2 * _cpu.count_dead(arguments.tensors) > rows
    memory = torch.from_numpy(np.zeros(size, dtype=np.uint8)) if mostly_dead else _spare.take(size)
    return memory.view(logits.dtype).as_strided(logits.shape, strides, offset), mostly_dead
