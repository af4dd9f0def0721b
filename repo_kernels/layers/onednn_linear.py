"""Linear layers that use oneDNN in forward and backward, for fp32 training on CPUs that Intel did not make.

PyTorch multiplies fp32 matrices by MKL, which does not use AVX-512 on such processors: oneDNN is a fifth faster there.
The choice depends on the processor alone, so that a resumed run computes the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..backends.cpu import layers as cpu
from .forwards import replaced_forwards
from .packed_linear import available


@functools.cache
def mkl_is_slow() -> bool:
    """Return whether PyTorch multiplies by MKL on a processor with AVX-512 that Intel did not make."""
    capable = torch.backends.cpu.get_cpu_capability() == "AVX512"
    info = Path("/proc/cpuinfo")
    maker = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else "GenuineIntel"
    return torch.backends.mkl.is_available() and capable and "GenuineIntel" not in maker


@functools.cache
def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `product` exists for this device and dtype and is faster than PyTorch's own."""
    exists = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return device.type == "cpu" and dtype == torch.float32 and exists and mkl_is_slow()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a @ b^T + bias in fp32: (..., k), (n, k), (n,) -> (..., n).

    `a` is copied unless it is contiguous; `b` is not copied.
    """
    if a.dim() == 2 and a.stride(0) == 1 < a.stride(1) and cpu.available():
        a = cpu.transposed(a.t())
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return out


class OneDnnLinear(torch.autograd.Function):
    """Compute F.linear by oneDNN. x: (..., in); weight: (out, in); bias: (out,) or None; fp32 on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, d_x, d_weight, d_bias = grad.reshape(-1, grad.shape[-1]), None, None, None
        if ctx.needs_input_grad[0]:
            d_x = product(grad, weight.t())  # not a view, so that autograd may add to it in place
        if ctx.needs_input_grad[1]:
            d_weight = product(rows.t(), x.reshape(-1, x.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(0)
        return d_x, d_weight, d_bias


@contextmanager
def onednn_linears(module: nn.Module) -> Iterator[None]:
    """Context in which every nn.Linear of an fp32 module uses oneDNN on a CPU where MKL is slow.

    It may be entered again inside itself.
    """
    applies = mkl_is_slow() and available(module)
    layers = [m for m in module.modules() if type(m) is nn.Linear and "forward" not in m.__dict__] if applies else []
    with replaced_forwards({layer: functools.partial(_forward, layer) for layer in layers}):
        yield


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or not x.numel() or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, layer.weight, layer.bias)
    y: Tensor = OneDnnLinear.apply(x, layer.weight, layer.bias)
    return y
