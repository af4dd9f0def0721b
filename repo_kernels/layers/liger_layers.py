"""RMSNorm, SwiGLU and rotary embedding by the Triton kernels of Liger, for layers on a GPU that are not compiled.

PyTorch takes about twenty launches per layer for them, Liger one each. The package liger-kernel is optional.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def functions() -> SimpleNamespace:
    """Return Liger's autograd functions: norm, swiglu and rope.

    Raises:
        ImportError: liger-kernel, or what it needs, is not installed.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return SimpleNamespace(norm=LigerRMSNormFunction, swiglu=LigerSiLUMulFunction, rope=LigerRopeFunction)


def why_not() -> str:
    """Return why Liger's functions cannot be used, "" if they can."""
    try:
        functions()
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("liger_kernel")
        return "is not installed" if missing else f"cannot be imported: {error}"
    return ""


def on_gpu(tensor: Tensor) -> bool:
    """Return whether a tensor is where Triton runs."""
    return tensor.is_cuda


def fits(*tensors: Tensor) -> bool:
    """Return whether all are plain tensors on a GPU, not empty, and of one type that the kernels take."""
    plain = all(type(t) in (Tensor, nn.Parameter) and on_gpu(t) and t.numel() > 0 for t in tensors)
    return plain and len({t.dtype for t in tensors}) == 1 and tensors[0].dtype in DTYPES


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Compute weight * x / sqrt(mean(x^2) + epsilon). x: (..., H); weight: (H,)."""
    # the upstream gradient is left alone: a residual connection reads it too
    y: Tensor = functions().norm.apply(x, weight, epsilon, 0.0, "llama", False)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up of two tensors of one shape, which the backward pass overwrites."""
    y: Tensor = functions().swiglu.apply(gate, up)
    return y


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Compute x * cos + rotate_half(x) * sin.

    q, k: (B, heads, T, D), which may be overwritten. cos, sin: (B or 1, T, D).
    """
    rotated: tuple[Tensor, Tensor] = functions().rope.apply(q, k, cos, sin)
    return rotated
