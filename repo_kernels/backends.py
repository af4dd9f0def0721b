"""Which backend runs: the one place where it is decided.

A backend is a module with `fused`, `statistics`, `apply` and `scale_rows` over flat rows (rows.py).
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from .checks import check_choice, describe

BACKENDS = ("triton", "cpu", "eager")
_MODULES = {"triton": "gpu", "cpu": "cpu", "eager": "eager"}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def load(backend: str) -> ModuleType:
    """The backend's module; Triton is imported on its first use."""
    return importlib.import_module(f".{_MODULES[backend]}", __package__)


@functools.cache
def _cpu_available() -> bool:
    if load("cpu").available():
        return True
    warnings.warn(
        "repo_kernels was built without its C++ extension: PyTorch serves the CPU, several times slower. "
        "Install g++ >= 11 or clang >= 14 and reinstall for the C++ backend; backend='eager' says that this is meant.",
        stacklevel=2,
    )
    return False


@functools.cache
def _triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def default_backend(source: Tensor) -> str:
    """CUDA, ROCm: "triton". CPU: "cpu", or "eager" without the extension. fp64 and other devices: "eager"."""
    if source.dtype not in KERNEL_DTYPES:
        return "eager"
    if source.device.type == "cuda":
        return "triton"
    return "cpu" if source.device.type == "cpu" and _cpu_available() else "eager"


def choose_backend(backend: str | None, source: Tensor) -> str:
    """The backend for logits or hidden states like `source`; None: by device.

    Raises ValueError or TypeError when the backend asked for cannot take `source`.
    """
    if backend is None:
        return default_backend(source)
    check_choice("backend", backend, BACKENDS)
    if backend == "eager":
        return backend
    if source.dtype not in KERNEL_DTYPES:
        raise TypeError(f"backend={backend!r} takes float32, bfloat16 or float16; got {describe(source)}: use 'eager'")
    if backend == "cpu":
        if source.device.type != "cpu":
            raise ValueError(f"backend='cpu' takes tensors on the CPU; got {describe(source)}")
        if not load("cpu").available():
            raise ValueError("backend='cpu' needs the C++ extension, which this install was built without")
        return backend
    if not _triton_available():
        raise ValueError("backend='triton' needs the triton package; it is not installed")
    if source.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend='triton' takes tensors on a GPU, or on the CPU with TRITON_INTERPRET=1 set before it is first "
            f"used; got {describe(source)}"
        )
    return backend
