"""The choice between Triton and PyTorch for the parts of a decode step."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch import Tensor

from ..backends.choice import choose_backend


@functools.cache
def triton_launches() -> ModuleType:
    """Return the launches of the Triton kernels, which are imported at their first use."""
    return importlib.import_module("..backends.triton.decode.launch", __package__)


def usable(backend: str | None, source: Tensor, why_not: str = "") -> bool:
    """Return whether Triton computes a function of tensors like `source`.

    Args:
        backend: "triton", "eager", or None for Triton on a GPU.
        source: only dtype and device are looked at.
        why_not: why the kernel does not take the arguments, "" if it does.

    Raises:
        ValueError: backend is "triton" and cannot be used, or there is no such backend.
    """
    if backend is None:
        return source.device.type == "cuda" and not why_not
    if backend not in ("triton", "eager"):
        raise ValueError(f"backend must be 'triton', 'eager' or None; got {backend!r}")
    if backend == "triton" and why_not:
        raise ValueError(f"backend='triton' cannot be used: {why_not}")
    return choose_backend(backend, source) == "triton"
