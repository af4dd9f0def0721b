"""Sampling of one token per row by inverting the cumulative distribution, so that one uniform number decides it.

In PyTorch it writes the probabilities and their fp64 sums for the whole vocabulary. Triton and C++ read the logits for
sums of blocks of them, and once more in the block that is chosen. All give the same token, except where rounding
moves the boundary of two tokens across the uniform number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.choice import CPU_BUILT, KERNEL_DTYPES, TRITON_INSTALLED
from ..backends.cpu import decoding as cpu
from .decode_backend import triton_launches, usable

MOST_COLUMNS = 2**20  # of a row, whose sums of blocks one program of the kernel holds


def sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one token per row.

    Args:
        logits: (B, V).
        uniforms: (B,) in [0, 1), best in fp64.
        temperature: divides the logits.
        top_p: sample from the most likely tokens that together reach this probability; 1: from all.
        backend: "triton", "cpu", "eager", or None for the fastest that can be used.

    Returns:
        Tokens (B,) int64 and their log-probabilities (B,) fp32 in nats, in the distribution that was drawn from.

    Raises:
        ValueError: the backend cannot be used.
    """
    why_not_cpu = _why_not_cpu(logits, top_p) if backend in (None, "cpu") else "another backend is asked for"
    if not why_not_cpu:
        return cpu.sample(logits, uniforms.to(torch.float64), float(temperature))
    if backend == "cpu":
        raise ValueError(f"backend='cpu' cannot be used: {why_not_cpu}")
    if not usable(backend, logits, _why_eager(logits, top_p)):
        return _eager(logits, uniforms, temperature, top_p)
    return triton_launches().sample(logits, uniforms.to(torch.float64), float(temperature))


def _why_eager(logits: Tensor, top_p: float) -> str:
    """Return why the Triton kernels do not take these arguments, "" if they do."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if top_p < 1:
        return "top_p below 1 sorts the probabilities"
    if logits.dtype not in KERNEL_DTYPES or logits.stride(1) != 1 or logits.shape[1] > MOST_COLUMNS:
        return f"logits must be float32, bfloat16 or float16, with at most {MOST_COLUMNS} adjacent columns"
    return ""


def _why_not_cpu(logits: Tensor, top_p: float) -> str:
    """Return why the C++ backend does not take these arguments, "" if it does."""
    if not CPU_BUILT:
        return "repo_kernels was built without its C++ backend"
    if top_p < 1:
        return "top_p below 1 sorts the probabilities"
    fits = logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.numel() > 0
    return "" if fits else "logits must be float32 on the CPU, and not empty"


def _eager(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Compute sample_tokens in PyTorch."""
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(outside, 0.0))
    cdf = probs.cumsum(-1, dtype=torch.float64)
    threshold = uniforms.to(cdf)[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, threshold, right=True).clamp_max(logits.shape[-1] - 1)
    return tokens.squeeze(-1), (probs.gather(-1, tokens) / cdf[:, -1:]).log().float().squeeze(-1)
