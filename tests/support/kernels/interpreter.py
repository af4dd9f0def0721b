"""Make Triton's interpreter round as the hardware does, in fused multiply-add and from fp32 to bf16.

The interpreter truncates to bf16, and older versions of it round a fused multiply-add twice. The accuracy of the
kernels depends on both roundings.
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


def nearest_bf16(values: np.ndarray) -> np.ndarray:
    """Round fp32 values to the nearest bf16, ties to even; return their bits (uint16)."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def round_as_hardware(patch: pytest.MonkeyPatch) -> None:
    """Replace both roundings of the interpreter, until the patch is undone."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_to_nearest(values: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return nearest_bf16(values)
        return convert(values, source, target, mode)

    patch.setattr(interpreter, "_convert_float", convert_to_nearest)
    patch.setattr(interpreter.InterpreterBuilder, "create_fma", fma_in_fp64)


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
