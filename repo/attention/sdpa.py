"""Attention by PyTorch's SDPA, called once for each run of adjacent sequences of equal length. Works everywhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data.segments import Segments

Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float, int | None, float | None], Tensor]
"""Function of q (T, Hq, D), k and v (K, Hk, D), segments, scale, window and softcap that returns (T, Hq, D).

scale: factor of the scores. window: keys that a query attends to at most, itself included; None for all. softcap: bound
of the scores by softcap * tanh(score / softcap); None for no bound.
"""

# cuDNN, which PyTorch prefers on Hopper, builds an execution plan for each new shape. Here every length is a new shape,
# so that most calls of a run would build one. The kernels below take any length as it comes.
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def per_run(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Compute attention by one call of PyTorch's SDPA for each run of segments; arguments and result as in Kernel."""
    queries = q.split([run.number * run.queries for run in segments.runs])
    keys, values = (x.split([run.number * run.keys for run in segments.runs]) for x in (k, v))
    outputs = []
    with without_plans(q.device):
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
                b, c = repeated(b, a.shape[1]), repeated(c, a.shape[1])
                out = F.scaled_dot_product_attention(a, b, c, attn_mask=mask, is_causal=mask is None, scale=scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def without_plans(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which SDPA plans nothing for new lengths: on CUDA it does not use cuDNN."""
    return sdpa_kernel(WITHOUT_PLANS) if device.type == "cuda" else nullcontext()


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Compute softmax(softcap tanh(q k^T scale / softcap) + mask) v, which PyTorch's SDPA does not support.

    q: (n, Hq, Lq, D). k, v: (n, Hk, Lk, D). mask: additive (Lq, Lk); None for a causal mask, where Lq = Lk.
    """
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))
    if mask is None:
        length = q.shape[2]
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    else:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def repeated(x: Tensor, heads: int) -> Tensor:
    """Repeat the grouped heads of x (n, Hk, ...) to `heads` heads."""
    return x.repeat_interleave(heads // x.shape[1], 1)
