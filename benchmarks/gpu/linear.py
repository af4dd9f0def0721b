"""How much more than its matrix products does the loss from hidden states cost, beside its peers, and which memory?

Work is that of the products: 6 N H V operations with a trained head, 4 with a frozen one, 2 for log-probabilities.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_linear import (
    BETA,
    TOLERANCE,
    Problem,
    cut,
    gradients,
    liger,
    make_problem,
    materialised,
    products,
    trl,
)  # fmt: skip
from benchmarks.gpu.plan import Plan
from benchmarks.harness.cases import Outputs, Setup, Way
from benchmarks.harness.results import LIMIT, OURS
from benchmarks.workloads.peers import missing
from repo_kernels import linear_repo_loss, linear_selective_log_softmax

NAME = "linear"
SUBJECT = "linear_repo_loss"
PEAKS = True


def cases(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the parameters of each case by its name."""
    return {
        f"N = {tokens}, H = {hidden}, V = {vocabulary}": {
            "tokens": tokens,
            "hidden": hidden,
            "vocabulary": vocabulary,
            "chunks": list(plan.chunks),
        }
        for tokens, hidden, vocabulary in plan.heads
    }


def small(parameters: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the parameters of a problem of the same width with few tokens and a small head."""
    return {**parameters, "tokens": plan.few, "hidden": min(parameters["hidden"], 256)}


def ours(p: Problem, weight: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Compute linear_repo_loss by the Triton backend, also on a CPU, where the interpreter runs it."""
    return linear_repo_loss(
        p.hidden, weight, p.ids, p.old, p.advantages, ref_logps=p.old, beta=BETA, chunk_tokens=chunk_tokens,
        backend="triton",
    ).loss  # fmt: skip


def log_probabilities(p: Problem, chunk_tokens: int | None = None) -> Outputs:
    """Compute the log-probabilities alone."""
    with torch.no_grad():
        return (linear_selective_log_softmax(p.hidden, p.weight, p.ids, chunk_tokens=chunk_tokens, backend="triton"),)


def exact_log_probabilities(p: Problem) -> Outputs:
    """Compute the same in fp64."""
    q = p.in_fp64()
    return (torch.log_softmax(q.hidden @ q.weight.t(), -1).gather(-1, p.ids[:, None])[:, 0].detach(),)


def peers(way: Callable[..., Way]) -> tuple[dict[str, Way], dict[str, str]]:
    """Return the ways of other packages, and those that are not installed with the reason."""
    packages = {
        "trl": ("TRL ChunkedLogProbFunction + PyTorch", trl, False),
        "liger-kernel": ("Liger chunked GRPO, compiled", functools.partial(liger, compiled=True), True),
        "cut-cross-entropy": ("cut-cross-entropy + PyTorch", functools.partial(cut, kind="cce"), False),
    }
    ways, absent = {}, {}
    for package, (name, loss, compiled) in packages.items():
        if reason := missing(package):
            absent[name] = reason
        else:
            ways[name] = way(loss, compiled=compiled)
    return ways, absent


def setup(tokens: int, hidden: int, vocabulary: int, chunks: list[int]) -> Setup:
    """Set up all ways to compute the loss and its gradients, and the products alone."""
    p = make_problem(tokens, hidden, vocabulary)
    product, tolerance = 2.0 * tokens * hidden * vocabulary, TOLERANCE[p.hidden.dtype]

    def way(loss: Callable[[Problem, Tensor], Tensor], frozen: bool = False, **more: Any) -> Way:
        call = functools.partial(gradients, loss, p, frozen=frozen)
        return Way(
            call, work=(2 if frozen else 3) * product, tolerance=tolerance, outputs=2 if frozen else None, **more
        )

    def logps(chunk: int | None) -> Way:
        expected = functools.partial(exact_log_probabilities, p)
        return Way(functools.partial(log_probabilities, p, chunk), OURS, product, tolerance, expected=expected)

    def exact() -> Outputs:
        return gradients(materialised, p.in_fp64())

    middle = chunks[len(chunks) // 2]
    ways = {SUBJECT: way(ours, role=OURS)}
    for chunk in chunks:
        ways[f"{SUBJECT}, chunk_tokens={chunk}"] = way(functools.partial(ours, chunk_tokens=chunk), role=OURS)
    ways[f"{SUBJECT}, frozen head"] = way(ours, frozen=True, role=OURS)
    chunked = functools.partial(ours, chunk_tokens=middle)
    ways[f"{SUBJECT}, frozen head, chunk_tokens={middle}"] = way(chunked, frozen=True, role=OURS)
    ways["log-probs alone"] = logps(None)
    ways[f"log-probs alone, chunk_tokens={middle}"] = logps(middle)
    ways["PyTorch, all logits"] = way(materialised)
    others, absent = peers(way)
    ways |= others | {name: Way(call, LIMIT, 3 * product) for name, call in products(p).items()}
    formula = f"2 N H V = 2 x {tokens} x {hidden} x {vocabulary} = {product / 1e9:.0f} GFLOP a product"
    return Setup(ways, SUBJECT, "operations", formula, absent, exact)
