"""Make Triton's interpreter compute as the hardware does: fused multiply-add, fp32 to bf16, products of bf16 matrices.

The interpreter truncates to bf16, and older versions of it round a fused multiply-add twice. The accuracy of the
kernels depends on both roundings. The bits of bf16 matrices it multiplies as integers.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

from typing import Any

import numpy as np
import pytest


def fma_in_fp64(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """Compute x y + z of TensorHandles in fp64, where the product of fp32 factors is exact, and round once."""
    from triton.runtime.interpreter import TensorHandle

    wide = np.multiply(x.data, y.data, dtype=np.float64) + z.data
    return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


def dot_in_fp32(builder: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    """Compute a b + d of TensorHandles, whose bf16 factors are held as their bits."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def wide(x: Any) -> np.ndarray:
        if x.dtype.scalar != tl.bfloat16:
            return x.data
        return (x.data.astype(np.uint32) << np.uint32(16)).view(np.float32)

    product = np.matmul(wide(a), wide(b), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def nearest_bf16(values: np.ndarray) -> np.ndarray:
    """Round fp32 values to the nearest bf16, ties to even; return their bits (uint16)."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def round_as_hardware(patch: pytest.MonkeyPatch) -> None:
    """Replace these parts of the interpreter, until the patch is undone."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_to_nearest(values: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return nearest_bf16(values)
        return convert(values, source, target, mode)

    patch.setattr(interpreter, "_convert_float", convert_to_nearest)
    patch.setattr(interpreter.InterpreterBuilder, "create_fma", fma_in_fp64)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_in_fp32)


def patch_language_once(patch: pytest.MonkeyPatch) -> None:
    """Patch triton.language once per module, not at each call of a device function, where it takes most of the time.

    A launch patches `tl`, which the kernels see. Triton's own functions see `tl.core`, which stays patched.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patched = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module not in patched and tl.core in self.fn.__globals__.values():
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
