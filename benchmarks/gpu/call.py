"""What does the call around the kernel cost: launches, and the host's time in a loop of calls?

Seconds are those of one call in a loop that ends when the device has done everything, as in a training step that waits
for nothing. A CUDA graph replays forward and backward.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_loss import BETA, SEQUENCES, TOLERANCE, Problem, gradient, make_problem, plain
from benchmarks.gpu.losses import for_liger, liger, ours, trl
from benchmarks.gpu.plan import Plan
from benchmarks.harness.cases import Outputs, Setup, Way
from benchmarks.harness.launches import count_launches, synchronize
from benchmarks.harness.results import OURS
from benchmarks.harness.timing import LONGEST_LEAD, clocked, host_seconds
from benchmarks.workloads.peers import missing
from repo_kernels import repo_loss

NAME = "call"
SUBJECT = "repo_loss"
PEAKS = False
DTYPE = "bf16"


def cases(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the parameters of each case by its name."""
    return {f"{n} x {v} {DTYPE}": {"tokens": n, "vocabulary": v} for n, v in plan.calls}


def small(parameters: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the parameters of a problem of the same width with few tokens."""
    return {**parameters, "tokens": plan.few}


def clock(plan: Plan) -> Callable[[Callable[[], object], float], float]:
    """Return a clock that divides the time of a loop by its calls."""

    def in_loop(call: Callable[[], object], lead: float) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(plan.repeats):
            call()
        synchronize()
        return (time.perf_counter() - start) / plan.repeats

    return in_loop


def more(call: Callable[[], object], plan: Plan) -> dict[str, Any]:
    """Return the fields of a row that a loop of calls does not tell: kernels launched, and the device's time."""
    lead = min(2 * host_seconds(call), LONGEST_LEAD) if torch.cuda.is_available() else 0.0
    device_seconds = statistics.median(clocked(call, lead) for _ in range(plan.rounds[NAME]))
    return {"launches": count_launches(call), "device_seconds": device_seconds}


def by_sequence(p: Problem, mask: Tensor, costs: Tensor) -> Outputs:
    """Compute repo_loss of (B, L, V) logits with a mask, costs and a value of lambda, forward and backward."""
    logits, ids, old, ref = (t.view(SEQUENCES, -1, *t.shape[1:]) for t in (p.logits, p.ids, p.old, p.ref))
    advantages = p.advantages.view(SEQUENCES, -1)[:, 0]
    loss = repo_loss(
        logits, ids, old, advantages, ref_logps=ref, response_mask=mask, costs=costs, lam=0.5, beta=BETA,
        backend="triton",
    ).loss  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, p.logits)[0]


def in_graph(step: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """Return a call that replays the step from a CUDA graph, which its first call captures."""

    @functools.cache
    def captured() -> tuple[torch.cuda.CUDAGraph, Outputs]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step()
        return graph, outputs

    def replay() -> Outputs:
        graph, outputs = captured()
        graph.replay()
        return outputs

    return replay


def setup(tokens: int, vocabulary: int) -> Setup:
    """Set up all ways to call a loss and its gradient."""
    p = make_problem(DTYPE, tokens, vocabulary, 0.0, False)
    mask = torch.ones(SEQUENCES, tokens // SEQUENCES, dtype=torch.bool, device=p.ids.device)
    costs = torch.linspace(-1, 1, SEQUENCES, device=p.ids.device)
    whole = torch.compile(ours, fullgraph=True, dynamic=False)
    laid_out = functools.cache(functools.partial(for_liger, p))

    def way(call: Callable[[], Outputs], tolerance: float | None = TOLERANCE[DTYPE], **more: Any) -> Way:
        return Way(call, work=1.0, tolerance=tolerance, **more)

    ways = {
        SUBJECT: way(lambda: gradient(ours, p), role=OURS),
        f"{SUBJECT}, (B, L), mask, costs": way(lambda: by_sequence(p, mask, costs), None, role=OURS),
        f"{SUBJECT}, torch.compile": way(lambda: gradient(whole, p), role=OURS, compiled=True),
        "PyTorch": way(lambda: gradient(plain, p)),
    }
    absent = {}
    if torch.cuda.is_available():
        ways[f"{SUBJECT}, CUDA graph"] = way(in_graph(lambda: gradient(ours, p)), role=OURS)
    else:
        absent[f"{SUBJECT}, CUDA graph"] = "needs CUDA"
    for package, name, call in (
        ("liger-kernel", "Liger triton_grpo_loss", lambda: liger(p, laid_out(), False)),
        ("trl", "TRL log-probs + PyTorch", lambda: gradient(trl, p)),
    ):
        if reason := missing(package):
            absent[name] = reason
        else:
            ways[name] = way(call, None)  # compared in losses.py
    formula = "Forward and backward, a call in a loop"
    return Setup(ways, SUBJECT, "calls", formula, absent, lambda: gradient(plain, p.in_fp64()))
