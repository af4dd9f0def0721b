"""Memory of gradients on the CPU, where a page that the system hands out costs more than the kernel that fills it."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from ..interface import gradient_buffer, gradient_layout

LARGE = 4 << 20  # bytes; smaller blocks come back from the allocator with their pages


class Spare:
    """The last block that was handed out, which is handed out again once nobody holds a tensor on it.

    So a training step does not wait for the system to clear the pages of its gradient. Between steps one block is kept
    (none with `inplace=True`).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block = np.empty(0, dtype=np.uint8)
        self._user: weakref.ref[np.ndarray] | None = None

    def take(self, size: int) -> Tensor:
        """(size,) uint8, uninitialised."""
        with self._lock:
            taken = self._user is not None and self._user() is not None
            if taken or self._block.nbytes < size:
                self._block = np.empty(size, dtype=np.uint8)
            view = self._block[:size]
            self._user = weakref.ref(view)  # the tensor holds the view as long as its storage lives
        return torch.from_numpy(view)


_spare = Spare()


def new_gradient(logits: Tensor, dead: int) -> tuple[Tensor, bool]:
    """A gradient for logits of which `dead` rows are masked or ignored, and whether it holds zeros.

    Where most rows are dead it is of zero pages, which exist once they are written: dead rows then cost nothing.
    """
    strides, offset, elements = gradient_layout(logits)
    size = elements * logits.element_size()
    if size < LARGE:
        return gradient_buffer(logits), False
    mostly_dead = 2 * dead > logits.shape[:-1].numel()
    memory = torch.from_numpy(np.zeros(size, dtype=np.uint8)) if mostly_dead else _spare.take(size)
    return memory.view(logits.dtype).as_strided(logits.shape, strides, offset), mostly_dead
