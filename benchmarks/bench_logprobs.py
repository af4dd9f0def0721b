"""How fast are the log-probabilities of given tokens, from logits and from hidden states, beside PyTorch and the peers?

    pytest benchmarks/bench_logprobs.py             # table; --quick, --save, --compare OLD.json

With NVe = N x V x element size, the bytes of one pass over the logits, the work from logits is 1 NVe for the values and
2 NVe with the gradient, as much as a copy moves.
From hidden states it is 2 N H V operations for the values and three times that with gradients. Predicted: half a copy's
time for the values, a copy's with the gradient; the GEMM's time for the values from hidden states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench_linear, bench_loss
from benchmarks.harness.cases import Outputs, Setup, Way
from benchmarks.harness.limits import copy
from benchmarks.harness.results import LIMIT, OURS
from benchmarks.workloads.peers import missing, missing_on_gpu
from repo_kernels import linear_selective_log_softmax, selective_log_softmax
from repo_kernels.layers import onednn_linear

SMALL = {"tokens": 16}
Values = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def cases(quick: bool) -> dict[str, dict[str, Any]]:
    """Return cases of values alone, with the gradient, and with the entropy."""
    logits = {"tokens": 128 if quick else 1024, "vocabulary": 50_257}
    hidden = next(iter(bench_linear.cases(quick).values()))
    chosen = {
        "fp32 logits, values": {"dtype": "fp32", "gradient": False, **logits},
        "fp32 logits, with gradient": {"dtype": "fp32", "gradient": True, **logits},
        "hidden states, values": {"gradient": False, **hidden},
    }
    if not quick:
        chosen["bf16 logits, values"] = {"dtype": "bf16", "gradient": False, **logits}
        chosen["bf16 logits, with gradient"] = {"dtype": "bf16", "gradient": True, **logits}
        chosen["fp32 logits, values and entropy"] = {**chosen["fp32 logits, values"], "entropy": True}
        chosen["hidden states, with gradients"] = {"gradient": True, **hidden}
    return chosen


def setup(
    vocabulary: int, tokens: int, gradient: bool, dtype: str = "", hidden: int = 0, entropy: bool = False
) -> Setup:
    """Set up a case from hidden states if `hidden` is given, else from logits."""
    if hidden:
        return _from_hidden(tokens, hidden, vocabulary, gradient)
    return _from_logits(dtype, tokens, vocabulary, gradient, entropy)


def plain(logits: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """Compute log-probabilities, and the entropy if asked for, in PyTorch."""
    all_logps = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    logps = all_logps.gather(-1, ids[:, None])[:, 0]
    return (logps, -(all_logps.exp() * all_logps).sum(-1)) if entropy else (logps,)


def trl(logits: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """Compute them by TRL: by its Triton kernel on a GPU, elsewhere by its loop on a copy in fp32 (see bench_loss)."""
    from trl.trainer.utils import selective_log_softmax as values
    from trl.trainer.utils import selective_log_softmax_and_entropy as both

    logits = logits if logits.is_cuda else logits.float()
    return tuple(both(logits, ids)) if entropy else (values(logits, ids),)


def ours(logits: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """Compute them by selective_log_softmax on the backend of the device."""
    values = selective_log_softmax(logits, ids, return_entropy=entropy)
    return tuple(values) if entropy else (values,)


def _from_logits(dtype: str, tokens: int, vocabulary: int, gradient: bool, entropy: bool) -> Setup:
    p = bench_loss.make_problem(dtype, tokens, vocabulary, 0.0, False)
    size = p.logits.numel() * p.logits.element_size()
    passes = 2 if gradient else 1
    tolerance = bench_loss.TOLERANCE[dtype] if gradient else 1e-5

    def outputs(values: Callable[..., tuple[Tensor, ...]], logits: Tensor = p.logits) -> Outputs:
        with torch.set_grad_enabled(gradient):
            computed = values(logits, p.ids, entropy)
        if not gradient:
            return computed
        logps = computed[0]
        return logps.detach(), torch.autograd.grad(logps, logits, p.advantages.to(logps.dtype))[0]

    def way(values: Callable[..., tuple[Tensor, ...]], **more: Any) -> Way:
        return Way(functools.partial(outputs, values), work=passes * size, tolerance=tolerance, **more)

    ways = {"torch eager": way(plain), "torch.compile": way(torch.compile(plain, dynamic=False), compiled=True)}
    absent = {}
    if reason := missing("trl"):
        absent["TRL selective_log_softmax"] = reason
    else:
        ways["TRL selective_log_softmax"] = way(trl)
    ways["selective_log_softmax"] = way(ours, role=OURS)
    ways |= copy()
    formula = (
        f"{passes} NVe = {passes} x {tokens} x {vocabulary} x {p.logits.element_size()} = {passes * size / 1e6:.0f} MB"
    )
    expected = functools.partial(outputs, plain)
    return Setup(
        ways, "selective_log_softmax", "bytes", formula, absent,
        lambda: expected(p.in_fp64().logits),
    )  # fmt: skip


def _from_hidden(tokens: int, hidden: int, vocabulary: int, gradient: bool) -> Setup:
    p = bench_linear.make_problem(tokens, hidden, vocabulary)
    work = (6.0 if gradient else 2.0) * tokens * hidden * vocabulary

    def outputs(values: Values, q: bench_linear.Problem = p) -> Outputs:
        with torch.set_grad_enabled(gradient):
            logps = values(q.hidden, q.weight)[0]
        if not gradient:
            return (logps,)
        upstream = q.advantages.to(logps.dtype)
        return logps.detach(), *torch.autograd.grad(logps, (q.hidden, q.weight), upstream)

    def way(values: Values, **more: Any) -> Way:
        tolerance = bench_linear.TOLERANCE[p.hidden.dtype]
        return Way(functools.partial(outputs, values), work=work, tolerance=tolerance, **more)

    def materialised(states: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return plain(states @ weight.t(), p.ids, False)

    def trl_chunked(states: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        from trl.kernels import ChunkedLogProbFunction

        return (ChunkedLogProbFunction.apply(states, weight, None, p.ids, 1.0, 32_768, None, 1.0, ())[0],)

    def torch_chunked(states: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (-bench_linear.cross_entropy(states, weight, p.ids),)

    def cut(states: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (-bench_linear.cut_cross_entropy(states, weight, p.ids, "cce"),)

    def fused(states: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (linear_selective_log_softmax(states, weight, p.ids),)

    ways = {
        "PyTorch, all logits": way(materialised),
        "PyTorch, all logits, compiled": way(torch.compile(materialised, dynamic=False), compiled=True),
        "F.linear_cross_entropy": way(torch_chunked, slow=True),
    }
    absent = {}
    others = {
        "TRL ChunkedLogProbFunction": (trl_chunked, missing("trl")),
        "cut-cross-entropy": (cut, missing_on_gpu("cut-cross-entropy")),
    }
    for name, (values, reason) in others.items():
        if reason:
            absent[name] = reason
        else:
            ways[name] = way(values)
    ways["linear_selective_log_softmax"] = way(fused, role=OURS)
    alone = bench_linear.products(p)
    if gradient:
        ways |= {name: Way(call, LIMIT, work) for name, call in alone.items()}
    else:
        x, w = p.hidden.detach(), p.weight.detach()
        ways["the GEMM, fresh"] = Way(lambda: torch.mm(x, w.t()), LIMIT, work)
        if onednn_linear.multiplies(x.device, x.dtype):
            ways["the GEMM by oneDNN"] = Way(lambda: onednn_linear.product(x, w), LIMIT, work)
    formula = f"{'6' if gradient else '2'} N H V = {work / 1e9:.0f} GFLOP, N = {tokens}, H = {hidden}, V = {vocabulary}"
    expected = functools.partial(outputs, lambda states, weight: plain(states @ weight.t(), p.ids, False))
    return Setup(ways, "linear_selective_log_softmax", "operations", formula, absent, lambda: expected(p.in_fp64()))


def test_logprobs(measure, case) -> None:
    """Measure the values, with their gradient if the case asks for it."""
    measure(case, rounds=5 if "hidden" in case[1] else 9)
