"""Adapters: varlen functions of the C++ backend, of FlashAttention 2, 3 and 4 and of each PyTorch, as a Kernel.

What a function takes and returns is read from its signature, once, because it differs from version to version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from repo_kernels.layers import packed_attention as cpu_attention

from ..data.segments import Segments
from .sdpa import Kernel, repeated


def cpu_kernel(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Compute attention by repo_kernels' C++ kernel, as a Kernel. Raises ValueError if a softcap is given."""
    if softcap is not None:
        raise ValueError(f"softcap must be None for the C++ attention; got {softcap}")
    return cpu_attention.attention(q, k, v, segments.cu_q, segments.cu_k, scale, window)


def flash_kernel(function: Callable[..., Any]) -> Kernel:
    """Wrap FlashAttention's flash_attn_varlen_func, of version 2, 3 or 4, as a Kernel.

    All take grouped heads and causal windows. Version 4 and early releases of 3 also return the log-sum-exp.
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
    """Wrap torch.nn.attention.varlen.varlen_attn, which is FlashAttention 2 without softcap, as a Kernel.

    From 2.12 on it takes grouped heads by enable_gqa; before, they are repeated. From 2.11 on it takes a window, by
    which it is told to be causal, and a scale; 2.10 has is_causal instead, and the scale is put into the queries.
    """
    accepted = inspect.signature(function).parameters
    grouped, windowed, scaled = (name in accepted for name in ("enable_gqa", "window_size", "scale"))

    def attend(
        q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        if softcap is not None:
            raise ValueError(f"softcap must be None for varlen_attn; got {softcap}")
        if window is not None and not windowed:
            raise ValueError(f"window must be None for varlen_attn before torch 2.11; got {window}")
        options: dict[str, Any] = {}
        if windowed:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            options["is_causal"] = True
        if scaled:
            options["scale"] = scale
        else:
            q = q * (scale * q.shape[-1] ** 0.5)
        if q.shape[1] != k.shape[1]:
            if grouped:
                options["enable_gqa"] = True
            else:
                k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
        return function(q, k, v, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k, **options)

    return attend
