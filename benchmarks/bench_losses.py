"""How long does the loss with its gradient take, and how many passes over the logits is that worth?

    make bench

Traffic is counted in NVe: one pass over the logits, N x V x element size. Two are the lower bound (read the logits,
write the gradient). The effective rate printed is 2 NVe / time, whatever the implementation moves.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from repo_kernels import repo_loss

ROWS, VOCABULARY = 256, 49152


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (N, V), ids, old log-probs and advantages (N,)."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(ROWS, VOCABULARY, generator=generator)).to(dtype).requires_grad_()
    ids = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    old = torch.log_softmax(logits.detach().float(), -1).gather(-1, ids[:, None])[:, 0]
    return logits, ids, old, torch.randn(ROWS, generator=generator)


def plain(logits: Tensor, ids: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """The same loss as most training scripts write it: log_softmax, gather, autograd."""
    logps = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, None])[:, 0]
    ratio = (logps - old).exp()
    delta = logps - old
    surrogate = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (surrogate + 0.02 * ratio * ((-delta).exp() + delta - 1)).mean()


def fused(logits: Tensor, ids: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """repo_loss on the backend of the device."""
    return repo_loss(logits, ids, old, advantages, ref_logps=old, beta=0.02).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("loss", [plain, fused])
def test_loss_and_gradient(benchmark, loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Forward and backward of one call."""
    logits, *rest = inputs(dtype)

    def step() -> None:
        logits.grad = None
        loss(logits, *rest).backward()

    benchmark(step)
    size = 2 * logits.numel() * logits.element_size()
    benchmark.extra_info["GB/s at 2 NVe"] = round(size / benchmark.stats["median"] / 1e9, 2)
