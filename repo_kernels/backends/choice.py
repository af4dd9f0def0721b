"""The choice of backend of the losses: by device and dtype, or by name. Layers decide in their own `available`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from typing import cast

import torch
from torch import Tensor

from ..checks import check_choice, describe
from . import cpu
from .interface import Backend

BACKENDS = ("triton", "cpu", "eager")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def load(backend: str) -> Backend:
    """Return the backend of this name; Triton is imported at its first use."""
    return cast(Backend, importlib.import_module(f".{backend}", __package__))


# Looked up once, so that torch.compile sees constants.
CPU_BUILT = cpu.available()
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "repo_kernels was built without its C++ extension, so PyTorch computes on the CPU, several times slower. "
        "Install g++ >= 11 or clang >= 14 and reinstall to build it, or pass backend='eager' to accept PyTorch.",
        stacklevel=2,
    )


def default_backend(source: Tensor) -> str:
    """Choose by device and dtype: "triton" on CUDA and ROCm, "cpu" on the CPU, else "eager".

    fp64, other devices, and an install without Triton or without the C++ extension get "eager".
    """
    if source.dtype not in KERNEL_DTYPES:
        return "eager"
    if source.device.type == "cuda":
        return "triton" if TRITON_INSTALLED else "eager"
    if source.device.type != "cpu":
        return "eager"
    if not CPU_BUILT and not torch.compiler.is_compiling():
        _warn_once()
    return "cpu" if CPU_BUILT else "eager"


def check_backend(backend: str | None) -> None:
    """Raise ValueError unless `backend` is None or the name of one."""
    if backend is not None:
        check_choice("backend", backend, BACKENDS)


def choose_backend(backend: str | None, source: Tensor) -> str:
    """Return the backend for logits or hidden states like `source`.

    Args:
        backend: "triton", "cpu", "eager", or None for `default_backend`.
        source: logits or hidden states; only dtype and device are looked at.

    Raises:
        TypeError: the backend does not take this dtype.
        ValueError: there is no such backend, it is not installed, or it does not take this device.
    """
    if backend is None:
        return default_backend(source)
    check_backend(backend)
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
