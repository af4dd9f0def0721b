"""How fast is the loss with its gradient from logits, beside its peers and a copy?

Work is counted in NVe = N x V x element size, one pass over the logits: 2 for a loss with its gradient, 1 for
log-probabilities alone, whatever a way really moves. Ways that overwrite the logits get them back before each call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_loss import BETA, SEQUENCES, TOLERANCE, Problem, fused, gradient, make_problem, of_logps, plain
from benchmarks.gpu.kernel import captured_launch, time_form
from benchmarks.gpu.plan import Plan
from benchmarks.harness.cases import Outputs, Setup, Way
from benchmarks.harness.limits import device_copy
from benchmarks.harness.results import OURS
from benchmarks.workloads.peers import missing
from repo_kernels import selective_log_softmax

NAME = "losses"
PEAKS = False
SUBJECT = "repo_loss"


def cases(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the parameters of each case by its name."""
    return {
        f"{tokens} x {vocabulary} {dtype}": {
            "dtype": dtype,
            "tokens": tokens,
            "vocabulary": vocabulary,
            "compiled": (tokens, vocabulary, dtype) in plan.compiled,
            "copied": plan.copied,
        }
        for tokens, vocabulary, dtype in plan.losses
    }


def small(parameters: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the parameters of a problem of the same width with few tokens."""
    return {**parameters, "tokens": plan.few}


def ours(p: Problem, logits: Tensor, inplace: bool = False) -> Tensor:
    """Compute repo_loss by the Triton backend, also on a CPU, where the interpreter runs it."""
    return fused(p, logits, inplace, backend="triton")


def trl(p: Problem, logits: Tensor) -> Tensor:
    """Compute the loss in PyTorch from the log-probabilities of TRL's kernel."""
    from trl.kernels import selective_log_softmax_and_entropy

    return of_logps(selective_log_softmax_and_entropy(logits, p.ids)[0], p).mean()


def for_liger(p: Problem) -> Tensor:
    """Lay the logits out for Liger's kernel, which takes (B, L + 1, V) and ignores the last position."""
    logits = p.logits.detach().view(SEQUENCES, -1, p.logits.shape[-1])
    return torch.cat((logits, logits[:, :1]), 1).requires_grad_()


def liger(p: Problem, logits: Tensor, inplace: bool) -> Outputs:
    """Run Liger's kernel forward and backward; its bias-corrected KL is k3 times rho.

    An advantage counts for a whole sequence there. Returns (loss, gradient (B, L, V)).
    """
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    ids, old, ref, advantages = (t.view(SEQUENCES, -1) for t in (p.ids, p.old, p.ref, p.advantages))
    loss = triton_grpo_loss(
        logits, old, ref, ids, advantages[:, 0].contiguous(), temperature=1.0, beta=BETA, eps_low=0.2, eps_high=0.2,
        inplace=inplace, use_bias_correction_kl=True,
    )[0].mean()  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, logits)[0][:, :-1]


def log_probabilities(p: Problem, with_gradient: bool) -> Outputs:
    """Compute selective_log_softmax, and its gradient for the advantages as upstream."""
    logps = selective_log_softmax(p.logits if with_gradient else p.logits.detach(), p.ids, backend="triton")
    return (logps.detach(), torch.autograd.grad(logps, p.logits, p.advantages)[0]) if with_gradient else (logps,)


def exact_log_probabilities(p: Problem, with_gradient: bool) -> Outputs:
    """Compute the same in fp64."""
    logits = p.in_fp64().logits
    logps = torch.log_softmax(logits, -1).gather(-1, p.ids[:, None])[:, 0]
    return (logps.detach(), torch.autograd.grad(logps, logits, p.advantages.double())[0])[: 1 + with_gradient]


def trl_log_probabilities(p: Problem) -> Outputs:
    """Compute TRL's log-probabilities."""
    from trl.kernels import selective_log_softmax_and_entropy

    return (selective_log_softmax_and_entropy(p.logits.detach(), p.ids)[0],)


def quack(p: Problem) -> Outputs:
    """Compute QuACK's cross-entropy per token with its gradient in one pass."""
    from quack.cross_entropy import cross_entropy_fwd

    return cross_entropy_fwd(p.logits.detach(), p.ids, return_dx=True)


def quack_in_two(p: Problem) -> Outputs:
    """Compute QuACK's cross-entropy per token, then its gradient by autograd."""
    from quack.cross_entropy import cross_entropy

    losses = cross_entropy(p.logits, p.ids, reduction="none")
    return losses.detach(), torch.autograd.grad(losses, p.logits, torch.ones_like(losses))[0]


def exact_cross_entropy(p: Problem) -> Outputs:
    """Compute the same in fp64."""
    logits = p.in_fp64().logits
    losses = torch.nn.functional.cross_entropy(logits, p.ids, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


def overwriting(call: Callable[[Tensor], Outputs], original: Callable[[], Tensor], **more: Any) -> Way:
    """Return a way whose call overwrites its input, a copy of the original that is restored before each call."""
    kept, copied = functools.cache(original), functools.cache(lambda: original().detach().clone().requires_grad_())

    def reset() -> None:
        copied().detach().copy_(kept().detach())

    return Way(lambda: call(copied()), reset=reset, **more)


def peers(p: Problem, way: Callable[..., Way], exact: Callable[[], Outputs]) -> tuple[dict[str, Way], dict[str, str]]:
    """Return the ways of other packages, and those that are not installed with the reason."""

    def by_sequence() -> Outputs:
        loss, grad = exact()
        return loss, grad.view(SEQUENCES, -1, grad.shape[-1])

    laid_out, one_pass = functools.cache(functools.partial(for_liger, p)), p.logits.numel() * p.logits.element_size()
    in_place = overwriting(
        lambda logits: liger(p, logits, True), laid_out, work=2.0 * one_pass, tolerance=way().tolerance,
        expected=by_sequence,
    )  # fmt: skip
    cross_entropy = functools.partial(exact_cross_entropy, p)
    packages = {
        "liger-kernel": {
            "Liger triton_grpo_loss": way(lambda: liger(p, laid_out(), False), expected=by_sequence),
            "Liger triton_grpo_loss in place": in_place,
        },
        "trl": {
            "TRL log-probs + PyTorch": way(lambda: gradient(trl, p)),
            "TRL log-probs alone": way(
                lambda: trl_log_probabilities(p), work=one_pass, expected=lambda: exact_log_probabilities(p, False)
            ),
        },
        "quack-kernels": {
            "QuACK cross-entropy with gradient (no policy loss)": way(lambda: quack(p), expected=cross_entropy),
            "QuACK cross-entropy by autograd (no policy loss)": way(lambda: quack_in_two(p), expected=cross_entropy),
        },
    }
    ways: dict[str, Way] = {}
    absent = {}
    for package, named in packages.items():
        if reason := missing(package):
            absent |= dict.fromkeys(named, reason)
        else:
            ways |= named
    return ways, absent


def setup(dtype: str, tokens: int, vocabulary: int, compiled: bool, copied: int) -> Setup:
    """Set up all ways to compute the loss and its gradient; large copies are made by the first call that needs them."""
    p = make_problem(dtype, tokens, vocabulary, 0.0, False)
    one_pass = p.logits.numel() * p.logits.element_size()

    def way(call: Callable[[], Outputs] = tuple, **more: Any) -> Way:
        return Way(call, **{"work": 2.0 * one_pass, "tolerance": TOLERANCE[dtype], **more})

    def exact() -> Outputs:
        return gradient(plain, p.in_fp64())

    def in_place(logits: Tensor) -> Outputs:
        return gradient(functools.partial(ours, inplace=True), Problem(**{**vars(p), "logits": logits}))

    def logps(with_gradient: bool) -> dict[str, Any]:
        expected = functools.partial(exact_log_probabilities, p, with_gradient)
        return {"call": functools.partial(log_probabilities, p, with_gradient), "role": OURS, "expected": expected}

    ways = {
        "repo_loss": way(lambda: gradient(ours, p), role=OURS),
        "repo_loss in place": overwriting(
            in_place, lambda: p.logits, role=OURS, work=2.0 * one_pass, tolerance=TOLERANCE[dtype]
        ),
        "repo_loss, its kernel alone": way(
            time_form(None, captured_launch(p)), role=OURS, expected=lambda: exact()[1:]
        ),
        "log-probs alone": way(**logps(False), work=one_pass),
        "log-probs with gradient": way(**logps(True)),
        "PyTorch": way(lambda: gradient(plain, p)),
    }
    if compiled:
        whole = torch.compile(plain, dynamic=False)
        ways["torch.compile"] = way(lambda: gradient(whole, p), compiled=True)
    others, absent = peers(p, way, exact)
    ways |= others | device_copy(copied)
    formula = f"1 NVe = {tokens} x {vocabulary} x {p.logits.element_size()} = {one_pass / 1e6:.0f} MB"
    return Setup(ways, SUBJECT, "bytes", formula, absent, exact)
