"""Which backend runs: the one place where it is decided.

A backend is a module with `new_gradient`, `fused`, `statistics`, `apply` and `scale_rows` over flat rows (rows.py).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from ..checks import check_choice, describe
from . import cpu

BACKENDS = ("triton", "cpu", "eager")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def load(backend: str) -> ModuleType:
    """The backend's module; Triton is imported on its first use."""
    return importlib.import_module(f".{backend}", __package__)


# Looked up once, so that torch.compile finds constants.
CPU_BUILT = cpu.available()
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "repo_kernels was built without its C++ extension: PyTorch serves the CPU, several times slower. "
        "Install g++ >= 11 or clang >= 14 and reinstall for the C++ backend; backend='eager' says that this is meant.",
        stacklevel=2,
    )


def default_backend(source: Tensor) -> str:
    """CUDA, ROCm: "triton". CPU: "cpu". Without Triton or the extension, for fp64 and on other devices: "eager"."""
    if source.dtype not in KERNEL_DTYPES:
        return "eager"
    if source.device.type == "cuda":
        return "triton" if TRITON_INSTALLED else "eager"
    if source.device.type != "cpu":
        return "eager"
    if not CPU_BUILT and not torch.compiler.is_compiling():
        _warn_once()
    return "cpu" if CPU_BUILT else "eager"


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
        if not CPU_BUILT:
            raise ValueError("backend='cpu' needs the C++ extension, which this install was built without")
        return backend
    if not TRITON_INSTALLED:
        raise ValueError("backend='triton' needs the triton package; it is not installed")
    if source.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend='triton' takes tensors on a GPU, or on the CPU with TRITON_INTERPRET=1 set before it is first "
            f"used; got {describe(source)}"
        )
    return backend
