"""The decorator of kernels whose run-time arguments take part in no specialisation."""

import inspect
from typing import Any

import triton
import triton.language as tl


def runtime_jit(function: Any) -> Any:
    """Apply `triton.jit` without specialisation on the value or the alignment of run-time arguments."""
    names = [name for name, p in inspect.signature(function).parameters.items() if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)
