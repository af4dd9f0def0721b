"""RMSNorm, SwiGLU and rotary embedding in one pass over memory each, forward and backward, for fp32 on the CPU.

In PyTorch they are some twenty operations a layer, each of which reads and writes all activations; with them goes the
time of a training step that is not matrix products. Within `fused_layers` those layers of a transformers model that
compute what is written here run so: whether a class does is found by trying its forward. Sums are in a fixed order.
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

ROTARY = "apply_rotary_pos_emb"  # the global that attention layers of transformers call
SILU = ("SiLU", "SiLUActivation")  # of PyTorch and of transformers


class RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + epsilon). x: (..., H); weight: (H,)."""

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
    """silu(gate) * up, of one shape."""

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
    """x * cos + rotate_half(x) * sin of queries and keys. q, k: (B, heads, T, D); cos, sin: (B, 1, T, D), constants."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return cpu.rotate(q, cos, sin, False), cpu.rotate(k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return cpu.rotate(of_q, cos, sin, True), cpu.rotate(of_k, cos, sin, True), None, None


def _fits(*tensors: Tensor) -> bool:
    """fp32 on the CPU, all of it here (not a sharded weight), and to be computed in fp32."""
    plain = all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.is_cpu for t in tensors)
    return plain and not torch.is_autocast_enabled("cpu")


def rms_norm(layer: Any, x: Tensor) -> Tensor:
    """The forward of a layer with `weight` and `variance_epsilon`."""
    if not _fits(x, layer.weight) or layer.weight.shape != x.shape[-1:] or not x.numel():
        return type(layer).forward(layer, x)
    return RmsNorm.apply(x, layer.weight, layer.variance_epsilon)


def gated_mlp(layer: Any, x: Tensor) -> Tensor:
    """The forward of a layer with `gate_proj`, `up_proj`, `down_proj` and silu."""
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    inner = SwiGlu.apply(gate, up) if _fits(gate, up) and gate.shape == up.shape else layer.act_fn(gate) * up
    return layer.down_proj(inner)


def rotary(
    own: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """What transformers calls apply_rotary_pos_emb: q, k: (B, heads, T, D); cos, sin: (B or 1, T, D). own: the model's,
    for other layouts."""
    fits = unsqueeze_dim == 1 and cos.dim() == 3 and cos.shape == sin.shape and _fits(q, k, cos, sin)
    shape = (q.shape[0], *q.shape[2:])
    fits = fits and shape == (k.shape[0], *k.shape[2:]) and cos.shape[1:] == shape[1:] and shape[2] % 2 == 0
    if not fits or cos.shape[0] not in (1, shape[0]) or cos.requires_grad or sin.requires_grad:
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    return Rotary.apply(q, k, *(cpu.unit_columns(t).expand(shape).unsqueeze(1) for t in (cos, sin)))


@contextmanager
def fused_layers(module: nn.Module) -> Iterator[None]:
    """Within the context the layers of a module on the CPU run fused; it may be entered again."""
    found = {}
    if cpu.available() and next((p.is_cpu for p in module.parameters()), False):
        plain = (m for m in module.modules() if "forward" not in m.__dict__)
        found = {m: forward for m in plain if (forward := _fused(m)) is not None}
    try:
        for layer, forward in found.items():
            layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in found:
            layer.__dict__.pop("forward", None)


def _fused(layer: nn.Module) -> Callable[..., Any] | None:
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
    return _agrees(functools.partial(forward, layer), lambda x: RmsNorm.apply(x, weight, 0.5), x)


@functools.cache
def _is_gated_mlp(forward: Callable[..., Any]) -> bool:
    """Whether forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)) of the parts of its layer."""
    parts = {"gate_proj": lambda x: 2 * x, "up_proj": lambda x: x + 3, "down_proj": torch.exp, "act_fn": torch.sin}
    layer = SimpleNamespace(**parts)
    return _agrees(functools.partial(forward, layer), lambda x: torch.exp(torch.sin(2 * x) * (x + 3)), torch.ones(2, 3))


@functools.cache
def _with_rotary(forward: Callable[..., Any]) -> FunctionType | None:
    """The same function that finds `rotary` where it looks for its module's; None for those that do not look, or find
    something else."""
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(ROTARY)
    q, k = torch.linspace(-1, 2, 48).view(1, 3, 2, 8), torch.linspace(2, 5, 16).view(1, 1, 2, 8)
    angles = torch.linspace(0, 3, 16).view(1, 2, 8)
    if own is None or not _agrees(own, functools.partial(rotary, own), q, k, angles.cos(), angles.sin()):
        return None
    known = {**forward.__globals__, ROTARY: functools.partial(rotary, own)}
    found = FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)
    found.__kwdefaults__ = forward.__kwdefaults__
    return found


@torch.no_grad()
def _agrees(function: Callable[..., Any], expected: Callable[..., Any], *arguments: Tensor) -> bool:
    """Whether both give the same; not where one refuses."""
    try:
        torch.testing.assert_close(function(*arguments), expected(*arguments))
    except Exception:  # of a class of another form anything may come
        return False
    return True
