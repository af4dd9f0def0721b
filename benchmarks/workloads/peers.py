"""What ours is put beside: the packages, and those of their computations that run in Triton's interpreter.

Their kernels are compiled ahead of time in peer_kernels.py. What needs a patch to take CPU tensors is not run here:
TRL's chunked functions, which fold tiles that a matrix product has just written, and cut-cross-entropy, whose logits
never reach memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness.machine import installed

NEEDS_GPU = "" if torch.cuda.is_available() else "its Triton kernels need a GPU; their traffic is in benchmarks.compiled.traffic"
PACKAGES = ("liger-kernel", "trl", "cut-cross-entropy")


def missing(package: str) -> str | None:
    """Why a peer cannot be used, or None."""
    return None if installed(package) else f"{package} is not installed"


def absent() -> dict[str, str]:
    """Package -> why its kernels are not in the tables."""
    return {package: reason for package in PACKAGES if (reason := missing(package))}


def liger_call(logits: Tensor, level: str = "token") -> None:
    """Loss and gradient of (N, V) logits with KL, the gradient written over the logits (its default).

    Liger takes (B, L + 1, V) and leaves the last position out; here it is one more row, which no kernel touches.
    """
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    padded = torch.cat((logits.detach(), logits.detach()[:1]))[None].requires_grad_()
    rows = logits.shape[0]
    ids, zeros = torch.ones(1, rows, dtype=torch.int64), torch.zeros(1, rows)
    loss, _, _ = triton_grpo_loss(padded, zeros, zeros, ids, torch.ones(1), importance_sampling_level=level)
    loss.sum().backward()


def liger_log_softmax(logits: Tensor) -> None:
    """Log-probabilities alone."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    padded = torch.cat((logits.detach(), logits.detach()[:1]))[None]
    fused_selective_log_softmax(padded, torch.ones(1, logits.shape[0], dtype=torch.int64))


def liger_cross_entropy(logits: Tensor) -> None:
    """Cross-entropy and its gradient, written over the logits, as in the fused linear form: no scaling after it."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    leaf = logits.detach().requires_grad_()
    targets = torch.ones(logits.shape[0], dtype=torch.int64)
    LigerCrossEntropyFunction.apply(leaf, targets, None, -100, 0.0, 0.0, "mean", None, False)[0].backward()


def trl_call(logits: Tensor, entropy: bool = False) -> None:
    """Log-probability and entropy of (N, V) logits, and the gradient of the log-probability (and of the entropy)."""
    from trl.kernels import selective_log_softmax_and_entropy

    leaf = logits.detach().requires_grad_()
    logps, entropies = selective_log_softmax_and_entropy(leaf, torch.ones(logits.shape[0], dtype=torch.int64))
    (logps + entropies if entropy else logps).sum().backward()


# Package, title, call.
CALLS: tuple[tuple[str, str, Callable[[Tensor], None]], ...] = (
    ("liger-kernel", "Liger `triton_grpo_loss`", liger_call),
    ("liger-kernel", "Liger `triton_grpo_loss`, by sequence", lambda logits: liger_call(logits, "sequence")),
    ("liger-kernel", "Liger `fused_selective_log_softmax`", liger_log_softmax),
    ("liger-kernel", "Liger cross-entropy", liger_cross_entropy),
    ("trl", "TRL `selective_log_softmax_and_entropy`", trl_call),
    ("trl", "TRL, with the entropy's gradient", lambda logits: trl_call(logits, entropy=True)),
)
