"""How fast is the loss with its gradient from logits, beside PyTorch, its peers and a copy?

    pytest benchmarks/bench_loss.py                 # table; --quick, --save, --compare OLD.json

Work is counted in NVe = N x V x element size, the bytes of one pass over the logits. Two passes are the lower bound
(read the logits, write the gradient) and what a copy moves. The rate is 2 NVe / time for every way, whatever it really
moves (with full KL 3 NVe, as the reference's logits are read too). Predicted: the time of the copy where the
exponentials keep up, as they do in fp32 on two AVX-512 cores (10 operations a logit); 10 times that for PyTorch, which
makes 18 to 20 passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.cases import Outputs, Setup, Way
from benchmarks.harness.limits import copy
from benchmarks.harness.machine import device
from benchmarks.harness.results import OURS
from benchmarks.workloads.peers import missing
from repo_kernels import repo_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}  # gradients are rounded to the type of the logits
BETA, SEQUENCES = 0.02, 4
SMALL = {"tokens": 16}


def cases(quick: bool) -> dict[str, dict[str, Any]]:
    """Return a case per type, and those of the options that change the arithmetic."""
    sizes = {"tokens": 128 if quick else 1024, "vocabulary": 50_257}
    chosen = {name: {"dtype": name, **sizes} for name in DTYPES}
    if not quick:
        chosen["fp32, entropy with gradient"] = {**chosen["fp32"], "entropy_coef": 0.01}
        chosen["fp32, glibc's default allocator"] = {**chosen["fp32"], "allocator": "default"}
        chosen["bf16, full KL"] = {**chosen["bf16"], "full_kl": True}
    return chosen


@dataclass(frozen=True)
class Problem:
    """The inputs of the loss, of SEQUENCES sequences of equal length.

    logits (N, V) require grad; ids, old and ref (log-probs) and advantages are (N,); ref_logits (N, V) or None.
    """

    logits: Tensor
    ids: Tensor
    old: Tensor
    ref: Tensor
    advantages: Tensor
    ref_logits: Tensor | None
    entropy_coef: float

    def in_fp64(self) -> Problem:
        """Return the same numbers in fp64."""
        values = {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v
                  for k, v in vars(self).items()}  # fmt: skip
        return Problem(**{**values, "logits": values["logits"].requires_grad_()})


def make_problem(dtype: str, tokens: int, vocabulary: int, entropy_coef: float, full_kl: bool) -> Problem:
    """Draw logits with a standard deviation of 3, and old and reference log-probs near theirs."""
    on = device()
    draw = torch.Generator(on).manual_seed(0)
    logits = torch.randn(tokens, vocabulary, generator=draw, device=on).mul_(3).to(DTYPES[dtype])
    ids = torch.randint(0, vocabulary, (tokens,), generator=draw, device=on)
    logps = (logits.float().gather(-1, ids[:, None]) - logits.float().logsumexp(-1, keepdim=True))[:, 0]
    # Ratios lie on both sides of the clip, none so near that rounding decides.
    near = torch.tensor([-0.4, -0.1, 0.1, 0.4], device=on)
    old, ref = (logps + near[torch.randint(0, 4, (tokens,), generator=draw, device=on)] for _ in range(2))
    advantages = torch.randn(SEQUENCES, generator=draw, device=on).repeat_interleave(tokens // SEQUENCES)
    reference = logits.roll(1, 1) if full_kl else None
    return Problem(logits.requires_grad_(), ids, old, ref, advantages, reference, entropy_coef)


def of_logps(logps: Tensor, p: Problem) -> Tensor:
    """Compute surrogate + beta x rho x k3 per token in PyTorch, as most training scripts write it."""
    ratio = (logps - p.old).exp()
    surrogate = -torch.minimum(ratio * p.advantages, ratio.clamp(0.8, 1.2) * p.advantages)
    delta = logps - p.ref
    return surrogate + BETA * ratio * ((-delta).exp() + delta - 1)


def plain(p: Problem, logits: Tensor) -> Tensor:
    """Compute the loss in PyTorch: log_softmax, gather, autograd."""
    all_logps = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    logps = all_logps.gather(-1, p.ids[:, None])[:, 0]
    if p.ref_logits is None:
        loss = of_logps(logps, p)
    else:
        ratio = (logps - p.old).exp()
        loss = -torch.minimum(ratio * p.advantages, ratio.clamp(0.8, 1.2) * p.advantages)
        reference = torch.log_softmax(p.ref_logits.to(all_logps.dtype), -1)
        loss = loss + BETA * (all_logps.exp() * (all_logps - reference)).sum(-1)
    if p.entropy_coef:
        loss = loss + p.entropy_coef * (all_logps.exp() * all_logps).sum(-1)
    return loss.mean()


def fused(
    p: Problem, logits: Tensor, inplace: bool = False, masked: bool = False, backend: str | None = None
) -> Tensor:
    """Compute repo_loss, by default on the backend of the device."""
    options: dict[str, Any] = {"ref_logps": p.ref}
    if p.ref_logits is not None:
        options = {"ref_logits": p.ref_logits, "kl_estimator": "full"}
    ids = torch.full_like(p.ids, -100) if masked else p.ids
    return repo_loss(
        logits, ids, p.old, p.advantages, beta=BETA, entropy_coef=p.entropy_coef, inplace=inplace, backend=backend,
        **options,
    ).loss  # fmt: skip


def trl(p: Problem, logits: Tensor) -> Tensor:
    """Compute the loss in PyTorch from TRL's log-probabilities (its Triton kernel on a GPU, its loop elsewhere).

    The loop computes in the type of the logits and is 17 % off in bf16, so it is given a copy in fp32.
    """
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    logits = logits if logits.is_cuda else logits.float()
    if not p.entropy_coef:
        return of_logps(selective_log_softmax(logits, p.ids).float(), p).mean()
    logps, entropy = selective_log_softmax_and_entropy(logits, p.ids)
    return (of_logps(logps.float(), p) - p.entropy_coef * entropy.float()).mean()


def gradient(loss: Callable[[Problem, Tensor], Tensor], p: Problem) -> Outputs:
    """Run forward and backward: return (loss, gradient of the logits)."""
    value = loss(p, p.logits)
    return value.detach(), torch.autograd.grad(value, p.logits)[0]


def setup(dtype: str, tokens: int, vocabulary: int, entropy_coef: float = 0.0, full_kl: bool = False) -> Setup:
    """Set up all ways to compute the loss and its gradient."""
    p = make_problem(dtype, tokens, vocabulary, entropy_coef, full_kl)
    size = p.logits.numel() * p.logits.element_size()
    work, passes = (3 if full_kl else 2) * size, 3 if full_kl else 2
    again = p.logits.detach().clone()

    def in_place() -> Outputs:
        # Each call takes the gradient of the last one for its logits: other numbers, the same work.
        return gradient(
            functools.partial(fused, inplace=True), Problem(**{**vars(p), "logits": again.requires_grad_()})
        )

    def way(loss: Callable[[Problem, Tensor], Tensor], **more: Any) -> Way:
        return Way(functools.partial(gradient, loss, p), work=work, tolerance=TOLERANCE[dtype], **more)

    ways = {"torch eager": way(plain), "torch.compile": way(torch.compile(plain, dynamic=False), compiled=True)}
    absent = {}
    if reason := missing("trl"):
        absent["TRL selective_log_softmax + PyTorch"] = reason
    elif not full_kl:
        ways["TRL selective_log_softmax + PyTorch"] = way(trl)
    absent["Liger triton_grpo_loss"] = missing("liger-kernel") or "its Triton kernel needs a GPU (`make gpu`)"
    ways["repo_loss"] = way(fused, role=OURS)
    ways["repo_loss in place"] = Way(in_place, OURS, work, TOLERANCE[dtype])
    ways["repo_loss, all rows masked"] = Way(lambda: gradient(functools.partial(fused, masked=True), p), OURS)
    ways |= copy()
    formula = f"{passes} NVe = {passes} x {tokens} x {vocabulary} x {p.logits.element_size()} = {work / 1e6:.0f} MB"
    return Setup(ways, "repo_loss", "bytes", formula, absent, lambda: gradient(plain, p.in_fp64()))


def test_loss(measure, case) -> None:
    """Measure forward and backward of one call."""
    measure(case, rounds=15)
