"""How much more than its three matrix products does the loss from hidden states cost, beside PyTorch and its peers?

    pytest benchmarks/bench_linear.py               # table; --quick, --save, --compare OLD.json

The yardstick is three GEMMs (logits, dhidden, dweight: 3 x 2 N H V operations) that allocate their outputs, as a caller
without these kernels would; GEMMs that write into given memory are a row of their own. Predicted for N = 1024,
H = 576, V = 49 152: 174 GFLOP, 0.89 s at 196 GFLOP/s; a way that forms the logits twice has four GEMMs and takes 1.33
times that, a frozen head has two and takes 0.67; the kernel reads and writes the logits, 2 N V values, 0.4 GB or 15 ms.
A LoRA head has two and three thin ones (workloads/lora_head.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.bench_loss import BETA
from benchmarks.harness.cases import Outputs, Setup, Way
from benchmarks.harness.machine import device
from benchmarks.harness.results import LIMIT, OURS
from benchmarks.workloads.peers import missing, missing_on_gpu
from repo_kernels import LoraHead, linear_repo_loss
from repo_kernels.layers import onednn_linear

SEQUENCES, HIDDEN, VOCABULARY = 4, 576, 49_152
RANK, SCALING = 16, 2.0
SMALL = {"tokens": 64}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
Loss = Callable[["Problem", Tensor], Tensor]


def cases(quick: bool) -> dict[str, dict[str, Any]]:
    """Return the head of the embedded model, in fp32."""
    one = {"tokens": 128 if quick else 1024, "hidden": HIDDEN, "vocabulary": VOCABULARY}
    fp32 = {f"fp32, N = {one['tokens']}": one}
    return fp32 if quick else fp32 | {"fp32, glibc's default allocator": {**one, "allocator": "default"}}


@dataclass(frozen=True)
class Problem:
    """The inputs of the loss, of SEQUENCES sequences of equal length.

    hidden (N, H), weight (V, H) and an adapter of it, lora_a (r, H) and lora_b (V, r), require grad; ids, old (old
    log-probs, also those of the reference) and advantages are (N,).
    """

    hidden: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    ids: Tensor
    old: Tensor
    advantages: Tensor

    def in_fp64(self) -> Problem:
        """Return the same numbers in fp64."""
        cast = {
            name: value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
            for name, value in vars(self).items()
        }
        return Problem(**cast)


def make_problem(tokens: int, hidden: int, vocabulary: int) -> Problem:
    """Draw hidden states and a head, an advantage per sequence, and old log-probs near those of the head."""
    on = device()
    draw = torch.Generator(on).manual_seed(0)
    states = torch.randn(tokens, hidden, generator=draw, device=on)
    weight = torch.randn(vocabulary, hidden, generator=draw, device=on) * hidden**-0.5
    ids = torch.randint(0, vocabulary, (tokens,), generator=draw, device=on)
    # The other logits are N(0, 1), so that their log-sum is about log V + 1/2.
    old = (states * weight[ids]).sum(-1) - torch.log(torch.tensor(float(vocabulary))) - 0.5
    # Ratios lie on both sides of the clip, none so near that rounding decides.
    near = torch.tensor([-0.4, -0.1, 0.1, 0.4], device=on)
    old += near[torch.randint(0, 4, (tokens,), generator=draw, device=on)]
    advantages = torch.randn(SEQUENCES, generator=draw, device=on).repeat_interleave(tokens // SEQUENCES)
    kind = torch.bfloat16 if on.type == "cuda" else torch.float32
    lora_a = torch.randn(RANK, hidden, generator=draw, device=on) * hidden**-0.5
    lora_b = torch.randn(vocabulary, RANK, generator=draw, device=on) * 0.01
    trained = (t.to(kind).requires_grad_() for t in (states, weight, lora_a, lora_b))
    return Problem(*trained, ids, old, advantages)


def of_logps(logps: Tensor, p: Problem) -> Tensor:
    """Compute the loss in PyTorch from log-probabilities (N,)."""
    delta = logps - p.old
    ratio = delta.exp()
    surrogate = -torch.minimum(ratio * p.advantages, ratio.clamp(0.8, 1.2) * p.advantages)
    return (surrogate + BETA * ratio * ((-delta).exp() + delta - 1)).mean()


def materialised(p: Problem, weight: Tensor) -> Tensor:
    """Compute the loss in PyTorch from all logits at once."""
    logits = p.hidden @ weight.t()
    all_logps = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    return of_logps(all_logps.gather(-1, p.ids[:, None])[:, 0], p)


def ours(p: Problem, weight: Tensor | LoraHead) -> Tensor:
    """Compute linear_repo_loss on the backend of the device."""
    return linear_repo_loss(p.hidden, weight, p.ids, p.old, p.advantages, ref_logps=p.old, beta=BETA).loss


def liger(p: Problem, weight: Tensor, compiled: bool = False) -> Tensor:
    """Compute Liger's chunked GRPO loss, a sequence per chunk (its default); its bias-corrected KL is k3 times rho."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(beta=BETA, compiled=compiled, use_bias_correction_kl=True)
    old = p.old.view(SEQUENCES, -1)
    return module(
        p.hidden.view(SEQUENCES, -1, p.hidden.shape[-1]),
        weight,
        p.ids.view(SEQUENCES, -1),
        torch.ones_like(old),
        p.advantages.view(SEQUENCES, -1)[:, 0],
        ref_per_token_logps=old,
        old_per_token_logps=old,
    )[0]


def trl(p: Problem, weight: Tensor) -> Tensor:
    """Compute the loss from TRL's chunked log-probabilities, at the chunk size of its trainers."""
    from trl.kernels import ChunkedLogProbFunction

    logps, *_ = ChunkedLogProbFunction.apply(p.hidden, weight, None, p.ids, 1.0, 32_768, None, 1.0, ())
    return of_logps(logps, p)


def cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Compute PyTorch's linear_cross_entropy per token with its default options."""
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(hidden, weight, ids, reduction="none", options=options).float()


def cut_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, kind: str) -> Tensor:
    """Compute cut-cross-entropy per token; small gradients are not left out, as in the other ways."""
    from cut_cross_entropy import linear_cross_entropy

    options = {"filter_eps": None} if kind == "cce" else {}
    return linear_cross_entropy(hidden, weight, ids, reduction="none", impl=kind, **options).float()


def torch_chunked(p: Problem, weight: Tensor) -> Tensor:
    """Compute the loss from PyTorch's linear_cross_entropy."""
    return of_logps(-cross_entropy(p.hidden, weight, p.ids), p)


def cut(p: Problem, weight: Tensor, kind: str) -> Tensor:
    """Compute the loss from cut-cross-entropy."""
    return of_logps(-cut_cross_entropy(p.hidden, weight, p.ids, kind), p)


def gradients(loss: Loss, p: Problem, frozen: bool = False) -> Outputs:
    """Run forward and backward: return (loss, dhidden, dweight), or (loss, dhidden) with a frozen head."""
    weight = p.weight.detach() if frozen else p.weight
    value = loss(p, weight)
    return value.detach(), *torch.autograd.grad(value, (p.hidden,) if frozen else (p.hidden, weight))


def adapted_gradients(loss: Callable[[Problem, Any], Tensor], p: Problem, merged: bool = False) -> Outputs:
    """Run forward and backward with an adapter of the frozen head: return (loss, dhidden, dA, dB).

    merged: the adapter enters as a dense weight.
    """
    head = LoraHead(p.weight.detach(), p.lora_a, p.lora_b, SCALING)
    value = loss(p, head.base + SCALING * p.lora_b @ p.lora_a if merged else head)
    return value.detach(), *torch.autograd.grad(value, (p.hidden, p.lora_a, p.lora_b))


def peers(way: Callable[..., Way]) -> tuple[dict[str, Way], dict[str, str]]:
    """Return the ways of PyTorch and other packages, and those that cannot run here with the reason."""
    ways = {
        "PyTorch, all logits": way(materialised),
        "PyTorch, all logits, compiled": way(torch.compile(materialised, dynamic=False), compiled=True),
        "F.linear_cross_entropy + PyTorch": way(torch_chunked, slow=True),
    }
    packages: dict[str, dict[str, tuple[Loss, bool]]] = {
        "liger-kernel": {
            "Liger chunked GRPO": (liger, False),
            "Liger chunked GRPO, compiled": (functools.partial(liger, compiled=True), True),
        },
        "trl": {"TRL ChunkedLogProbFunction + PyTorch": (trl, False)},
        "cut-cross-entropy": {
            "cut-cross-entropy + PyTorch": (functools.partial(cut, kind="cce"), False),
            "cut-cross-entropy's torch_compile + PyTorch": (functools.partial(cut, kind="torch_compile"), True),
        },
    }
    absent = {}
    for package, named in packages.items():
        for name, (loss, compiled) in named.items():
            own_kernels = package == "cut-cross-entropy" and not compiled
            if why := missing_on_gpu(package) if own_kernels else missing(package):
                absent[name] = why
            else:
                ways[name] = way(loss, compiled=compiled)
    return ways, absent


def products(p: Problem) -> dict[str, Callable[[], object]]:
    """Return ways to compute the three GEMMs alone."""
    x, w = p.hidden.detach(), p.weight.detach()
    grad = torch.randn(x.shape[0], w.shape[0], device=x.device).to(x.dtype)
    out = torch.empty_like(grad), torch.empty_like(x), torch.empty_like(w)

    def fresh() -> object:
        return torch.mm(x, w.t()), torch.mm(grad, w), torch.mm(grad.t(), x)

    def given() -> None:
        torch.mm(x, w.t(), out=out[0])
        torch.mm(grad, w, out=out[1])
        torch.mm(grad.t(), x, out=out[2])

    def mixed() -> object:
        return onednn_linear.product(x, w), onednn_linear.product(grad, w.t()), torch.mm(grad.t(), x)

    alone: dict[str, Callable[[], object]] = {"three GEMMs, fresh": fresh, "three GEMMs, outputs given": given}
    if onednn_linear.multiplies(x.device, x.dtype):
        alone["three GEMMs, two by oneDNN"] = mixed
    return alone


def setup(tokens: int, hidden: int, vocabulary: int) -> Setup:
    """Set up all ways to compute the loss and its gradients, and the GEMMs alone."""
    p = make_problem(tokens, hidden, vocabulary)
    work, tolerance = 6.0 * tokens * hidden * vocabulary, TOLERANCE[p.hidden.dtype]

    def way(loss: Loss, **more: Any) -> Way:
        return Way(functools.partial(gradients, loss, p), work=work, tolerance=tolerance, **more)

    ways, absent = peers(way)
    ways["linear_repo_loss"] = way(ours, role=OURS)
    frozen = functools.partial(gradients, ours, p, frozen=True)
    ways["linear_repo_loss, frozen head"] = Way(frozen, OURS, work * 2 / 3, tolerance, outputs=2)
    adapted, thin = functools.partial(adapted_gradients, ours, p), 6.0 * tokens * RANK * vocabulary
    merged = functools.partial(adapted_gradients, materialised, merged=True)
    ways["linear_repo_loss, LoRA head"] = Way(
        adapted, OURS, work * 2 / 3 + thin, tolerance, expected=lambda: merged(p.in_fp64())
    )
    ways |= {name: Way(call, LIMIT, work) for name, call in products(p).items()}
    formula = f"Three GEMMs: 6 N H V = 6 x {tokens} x {hidden} x {vocabulary} = {work / 1e9:.0f} GFLOP"
    exact = functools.partial(gradients, materialised)
    return Setup(ways, "linear_repo_loss", "operations", formula, absent, lambda: exact(p.in_fp64()))


def test_linear(measure, case) -> None:
    """Measure forward and backward of one call."""
    measure(case, rounds=5)
