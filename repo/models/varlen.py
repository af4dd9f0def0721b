"""Varlen kernels: causal attention of packed sequences, and the choice of the kernel.

On CUDA it is FlashAttention's varlen kernel, on a CPU in fp32 that of repo_kernels, and else PyTorch's SDPA, called
once for each run of adjacent sequences of equal length. No T x T mask is built; the host never waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repo_kernels.layers import packed_attention as cpu_attention

from ..common.seeds import generator
from ..data.segments import Segments, make_segments

Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float, int | None, float | None], Tensor]
"""Function of q (T, Hq, D), k and v (K, Hk, D), segments, scale, window and softcap that returns (T, Hq, D).

scale: factor of the scores. window: keys that a query attends to at most, itself included; None for all. softcap: bound
of the scores by softcap * tanh(score / softcap); None for no bound.
"""


def per_run(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Compute attention by one call of PyTorch's SDPA for each run of segments; arguments and result as in Kernel."""
    queries = q.split([run.number * run.queries for run in segments.runs])
    keys, values = (x.split([run.number * run.keys for run in segments.runs]) for x in (k, v))
    outputs = []
    for run, *parts in zip(segments.runs, queries, keys, values, strict=True):
        a, b, c = (x.unflatten(0, (run.number, -1)).transpose(1, 2) for x in parts)  # (number, heads, length, D)
        mask = segments.mask(run, window, q)
        if softcap is not None:
            out = _softcapped(a, b, c, mask, scale, softcap)
        elif q.device.type == "cpu" or a.shape[1] == b.shape[1]:
            out = F.scaled_dot_product_attention(
                a, b, c, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=a.shape[1] != b.shape[1]
            )
        else:  # fp32 needs the memory-efficient CUDA kernel, which does not take grouped heads
            b, c = _repeat(b, a.shape[1]), _repeat(c, a.shape[1])
            out = F.scaled_dot_product_attention(a, b, c, attn_mask=mask, is_causal=mask is None, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Compute softmax(softcap tanh(q k^T scale / softcap) + mask) v, which PyTorch's SDPA does not support.

    q: (n, Hq, Lq, D). k, v: (n, Hk, Lk, D). mask: additive (Lq, Lk); None for a causal mask, where Lq = Lk.
    """
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))
    if mask is None:
        length = q.shape[2]
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    else:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _repeat(x: Tensor, heads: int) -> Tensor:
    """Repeat the grouped heads of x (n, Hk, L, D) to `heads` heads."""
    return x.repeat_interleave(heads // x.shape[1], 1)


@lru_cache
def varlen_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool = False
) -> tuple[str, Kernel] | None:
    """Choose the varlen kernel for a device, dtype and head size.

    softcap: the model bounds its scores. Returns the kernel's name and function, None if `per_run` must do it.
    """
    if not softcap and cpu_attention.available(device, dtype, head_dim):
        return "C++ varlen", cpu_kernel
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    return first_that_agrees(device, dtype, head_dim, softcap)


def first_that_agrees(
    device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool
) -> tuple[str, Kernel] | None:
    """Return name and function of the first installed kernel that agrees with `per_run` on the device, or None."""
    for name, package, attribute, adapt in _VARLEN:
        try:
            kernel = adapt(getattr(import_module(package), attribute))
            if _agrees(kernel, device, dtype, head_dim, 20.0 if softcap else None):
                return name, kernel
        except Exception:  # not installed, or refuses the device, head size or softcap with an error of any type
            continue
    return None


def cpu_kernel(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Compute attention by repo_kernels' C++ kernel, as a Kernel. Raises ValueError if a softcap is given."""
    if softcap is not None:
        raise ValueError(f"softcap must be None for the C++ attention; got {softcap}")
    return cpu_attention.attention(q, k, v, segments.cu_q, segments.cu_k, scale, window)


def flash_kernel(function: Callable[..., Any]) -> Kernel:
    """Wrap FlashAttention's flash_attn_varlen_func, of version 2, 3 or 4, as a Kernel.

    The versions take different arguments, and some return more than the output.
    """
    accepted = inspect.signature(function).parameters

    def attend(
        q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
        if "deterministic" in accepted:
            options["deterministic"] = True
        if "max_seqlen_q" in accepted:
            options |= {"max_seqlen_q": segments.max_q, "max_seqlen_k": segments.max_k}
        if window is not None:
            options["window_size"] = (window - 1, 0)
        if softcap is not None:
            options["softcap"] = softcap
        out = function(q, k, v, cu_seqlens_q=segments.cu_q, cu_seqlens_k=segments.cu_k, **options)
        return out[0] if isinstance(out, tuple) else out

    return attend


def torch_kernel(function: Callable[..., Any]) -> Kernel:
    """Wrap torch.nn.attention.varlen.varlen_attn, which is FlashAttention 2 without softcap, as a Kernel."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        if softcap is not None:
            raise ValueError(f"softcap must be None for varlen_attn; got {softcap}")
        lengths = segments.cu_q, segments.cu_k, segments.max_q, segments.max_k
        left = -1 if window is None else window - 1
        return function(q, k, v, *lengths, scale=scale, window_size=(left, 0), enable_gqa=q.shape[1] != k.shape[1])

    return attend


_VARLEN = (
    ("FlashAttention 3 varlen", "flash_attn_interface", "flash_attn_varlen_func", flash_kernel),
    ("FlashAttention 4 varlen", "flash_attn.cute", "flash_attn_varlen_func", flash_kernel),
    ("FlashAttention 2 varlen", "flash_attn", "flash_attn_varlen_func", flash_kernel),
    ("PyTorch varlen_attn", "torch.nn.attention.varlen", "varlen_attn", torch_kernel),
)


@torch.enable_grad()
def _agrees(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None) -> bool:
    """Tell whether a kernel's output and gradients agree with those of `per_run`.

    The inputs have a shared prompt; they are tried without and with a window.
    """
    segments = make_segments(*torch.tensor([[5, 3, 3], [0, 0, 0], [0, 5, 5]])).to(device)
    shapes = (11, 4, head_dim), (21, 2, head_dim), (21, 2, head_dim)
    inputs = [torch.randn(shape, generator=generator("kernel probe")) for shape in shapes]
    q, k, v = (x.to(device, dtype).requires_grad_() for x in inputs)
    for window in (None, 4):
        results = []
        for attend in (per_run, kernel):
            out = attend(q, k, v, segments, head_dim**-0.5, window, softcap)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
        if not all(torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05) for a, b in zip(*results, strict=True)):
            return False
    return True
