"""RMSNorm, SwiGLU and rotary embedding in one pass over memory each, forward and backward.

PyTorch takes about twenty operations per layer for them, each of which reads and writes all activations; this is most
of the time of a training step outside matrix products. `fused_layers` replaces the layers of a transformers model that
compute the same; whether a class does is decided by running its forward on a small input. In fp32 on the CPU the C++
backend computes them, with sums in a fixed order; on a GPU Liger does, where it is installed and asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..backends.cpu import layers as cpu
from . import liger_layers
from .forwards import replaced_forwards

ROTARY = "apply_rotary_pos_emb"  # the global that attention layers of transformers call
SILU = ("SiLU", "SiLUActivation")  # the classes of PyTorch and of transformers


class RmsNorm(torch.autograd.Function):
    """Compute weight * x / sqrt(mean(x^2) + epsilon). x: (..., H); weight: (H,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, inverse = cpu.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        return *cpu.rms_norm_gradient(x, weight, inverse, grad.contiguous(), ctx.needs_input_grad[1]), None


class SwiGlu(torch.autograd.Function):
    """Compute silu(gate) * up of two tensors of one shape."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return cpu.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return cpu.swiglu_gradient(gate, up, grad.contiguous())


class Rotary(torch.autograd.Function):
    """Compute x * cos + rotate_half(x) * sin for queries and keys.

    q, k: (B, heads, T, D), heads may differ; cos, sin: (B, 1, T, D), not differentiated.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return cpu.rotate(q, cos, sin, False), cpu.rotate(k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return cpu.rotate(grad_q, cos, sin, True), cpu.rotate(grad_k, cos, sin, True), None, None


def _fits(*tensors: Tensor) -> bool:
    """Return whether all are plain fp32 tensors on the CPU or "meta" (not sharded) and autocast is off."""
    plain = all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 for t in tensors)
    plain = plain and all(t.is_cpu or t.is_meta for t in tensors)
    return plain and not torch.is_autocast_enabled("cpu")


def rms_norm(layer: Any, x: Tensor) -> Tensor:
    """Run the forward of a layer with `weight` and `variance_epsilon` on x (..., H)."""
    shaped = layer.weight.shape == x.shape[-1:] and x.numel() > 0
    if shaped and _fits(x, layer.weight):
        return RmsNorm.apply(x, layer.weight, layer.variance_epsilon)
    if shaped and liger_layers.fits(x, layer.weight):
        return liger_layers.rms_norm(x, layer.weight, layer.variance_epsilon)
    return type(layer).forward(layer, x)


def gated_mlp(layer: Any, x: Tensor) -> Tensor:
    """Run the forward of a layer with `gate_proj`, `up_proj`, `down_proj` and silu on x (..., H)."""
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    if gate.shape == up.shape and _fits(gate, up):
        return layer.down_proj(SwiGlu.apply(gate, up))
    if gate.shape == up.shape and liger_layers.fits(gate, up):
        return layer.down_proj(liger_layers.swiglu(gate, up))
    return layer.down_proj(layer.act_fn(gate) * up)


def rotary(
    own: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys as apply_rotary_pos_emb of transformers does.

    Args:
        own: the model's function, which takes over for other layouts.
        q, k: (B, heads, T, D).
        cos, sin: (B or 1, T, D).
        unsqueeze_dim: dimension of the heads.
    """
    shape = (q.shape[0], *q.shape[2:])
    shaped = unsqueeze_dim == 1 and cos.dim() == 3 and cos.shape == sin.shape and shape == (k.shape[0], *k.shape[2:])
    shaped = shaped and cos.shape[1:] == shape[1:] and shape[2] % 2 == 0 and cos.shape[0] in (1, shape[0])
    if not shaped or cos.requires_grad or sin.requires_grad:
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    if _fits(q, k, cos, sin):
        return Rotary.apply(q, k, *(cpu.unit_columns(t).expand(shape).unsqueeze(1) for t in (cos, sin)))
    if liger_layers.fits(q, k, cos, sin):
        return liger_layers.rotary(q, k, cos, sin)
    return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


@contextmanager
def fused_layers(module: nn.Module, liger: bool = False) -> Iterator[None]:
    """Context in which the layers of a module run fused. It may be entered again inside itself.

    liger: use Liger for a module on a GPU, whose layers stay as they are otherwise.
    """
    fused, weight = {}, next(module.parameters(), None)
    by_cpp = weight is not None and cpu.available() and (weight.is_cpu or weight.is_meta)
    if by_cpp or (liger and weight is not None and liger_layers.on_gpu(weight)):
        plain = (m for m in module.modules() if "forward" not in m.__dict__)
        fused = {m: forward for m in plain if (forward := _fused(m)) is not None}
    with replaced_forwards({layer: MethodType(forward, layer) for layer, forward in fused.items()}):
        yield


def _fused(layer: nn.Module) -> Callable[..., Any] | None:
    """Return the fused forward of a layer, or None if it computes something else."""
    forward = type(layer).forward
    if hasattr(layer, "variance_epsilon") and _is_rms_norm(forward):
        return rms_norm
    if type(getattr(layer, "act_fn", None)).__name__ in SILU and _is_gated_mlp(forward):
        return gated_mlp
    return _with_rotary(forward)


@functools.cache
def _is_rms_norm(forward: Callable[..., Any]) -> bool:
    x, weight = torch.linspace(-1, 2, 24).view(3, 8), torch.linspace(0.5, 2, 8)
    layer = SimpleNamespace(weight=weight, variance_epsilon=0.5)
    return _agrees(
        functools.partial(forward, layer), lambda x: weight * x * (x.square().mean(-1, True) + 0.5).rsqrt(), x
    )


@functools.cache
def _is_gated_mlp(forward: Callable[..., Any]) -> bool:
    """Return whether forward computes down_proj(act_fn(gate_proj(x)) * up_proj(x)) with the parts of its layer."""
    parts = {"gate_proj": lambda x: 2 * x, "up_proj": lambda x: x + 3, "down_proj": torch.exp, "act_fn": torch.sin}
    layer = SimpleNamespace(**parts)
    return _agrees(functools.partial(forward, layer), lambda x: torch.exp(torch.sin(2 * x) * (x + 3)), torch.ones(2, 3))


@functools.cache
def _with_rotary(forward: Callable[..., Any]) -> FunctionType | None:
    """Copy a function so that it calls `rotary` instead of its module's apply_rotary_pos_emb.

    Returns None if it does not call that global, or if the global computes something else.
    """
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(ROTARY)
    q, k = torch.linspace(-1, 2, 48).view(1, 3, 2, 8), torch.linspace(2, 5, 16).view(1, 1, 2, 8)
    angles = torch.linspace(0, 3, 16).view(1, 2, 8)
    if own is None or not _agrees(own, _rotated, q, k, angles.cos(), angles.sin()):
        return None
    patched = {**forward.__globals__, ROTARY: functools.partial(rotary, own)}
    copy = FunctionType(forward.__code__, patched, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Compute rotary in PyTorch."""
    halves = ((x, torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)) for x in (q, k))
    return tuple(x * cos.unsqueeze(1) + turned * sin.unsqueeze(1) for x, turned in halves)


@torch.no_grad()
def _agrees(function: Callable[..., Any], expected: Callable[..., Any], *arguments: Tensor) -> bool:
    """Return whether both functions give close results; False if one raises."""
    try:
        torch.testing.assert_close(function(*arguments), expected(*arguments))
    except Exception:  # an unknown class may raise anything
        return False
    return True
