"""Linear layers that multiply in bfloat16, for fp32 weights and states on a CPU with instructions for it.

PyTorch's bfloat16 products add up in fp32 and, with AVX512_BF16 or AMX, take half of the time of fp32 ones. Inputs,
weights, upstream gradients and products are rounded to bfloat16; what lies between the products stays in fp32, and so
do the weights and the sums of their gradients, as under autocast. Rounded copies of the weights are kept until the
weights change.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from .forwards import replaced_forwards

INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}  # flags of /proc/cpuinfo
NARROWEST = 64  # inputs and outputs; casts take longer than narrower products
_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> (its version, bfloat16 copy)


@functools.cache
def available() -> bool:
    """Return whether the processor multiplies bfloat16, as Linux names its instructions."""
    info = Path("/proc/cpuinfo")
    words = info.read_text(encoding="utf-8", errors="replace").split() if info.is_file() else []
    return torch.backends.mkldnn.is_available() and not INSTRUCTIONS.isdisjoint(words)


def forget_copies(weights: Iterable[Tensor]) -> None:
    """Drop the copies of some weights. Needed after changes that PyTorch does not count, such as those of `.data`."""
    for weight in weights:
        _copies.pop(weight, None)


def rounded(weight: Tensor) -> Tensor:
    """Return a bfloat16 copy of a weight, the same one until the weight changes."""
    version, copy = _copies.get(weight, (None, None))
    if copy is None or version != weight._version:
        copy = weight.detach().bfloat16()
        _copies[weight] = weight._version, copy
    return copy


class Bf16Linear(torch.autograd.Function):
    """Compute F.linear in bfloat16. x: (..., in); weight: (out, in); bias: (out,) or None; all are fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        half, copy = x.bfloat16(), rounded(weight)
        ctx.save_for_backward(half, copy)
        y = nn.functional.linear(half, copy).float()
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        half, copy = ctx.saved_tensors
        up, d_x, d_weight, d_bias = grad.bfloat16(), None, None, None
        rows = up.reshape(-1, up.shape[-1])
        if ctx.needs_input_grad[0]:
            d_x = (rows @ copy).float().view(half.shape)
        if ctx.needs_input_grad[1]:
            d_weight = (rows.t() @ half.reshape(-1, half.shape[-1])).float()
        if ctx.needs_input_grad[2]:
            d_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return d_x, d_weight, d_bias


@contextmanager
def bf16_linears(module: nn.Module) -> Iterator[None]:
    """Context in which every wide nn.Linear of a module with fp32 weights on the CPU or "meta" multiplies in bfloat16.

    It may be entered again inside itself.
    """
    layers = [m for m in wide_linears(module) if "forward" not in m.__dict__]
    with replaced_forwards({layer: functools.partial(_forward, layer) for layer in layers}):
        yield


def wide_linears(module: nn.Module) -> list[nn.Linear]:
    """List the layers of a module that `bf16_linears` runs: each nn.Linear that is wide enough to gain from it."""
    layers = [m for m in module.modules() if type(m) is nn.Linear]
    return [m for m in layers if min(m.weight.shape, default=0) >= NARROWEST and _is_plain(m.weight)]


def _is_plain(x: Tensor) -> bool:
    """Return whether x is an fp32 tensor on the CPU or "meta", and not sharded."""
    return type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and (x.is_cpu or x.is_meta)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if not _is_plain(x) or not x.numel() or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, layer.weight, layer.bias)
    y: Tensor = Bf16Linear.apply(x, layer.weight, layer.bias)
    return y
