"""torch.compile: numbers that vary do not compile a graph each, nor do lengths and numbers of sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from repo_kernels import linear_repo_loss, linear_selective_log_softmax, repo_loss, selective_log_softmax
from tests.support.kernels.option_sets import make_call

MOST_GRAPHS = 2  # the first with the number as a constant, the second with it as an input
# Twelve values of each number, 0 among them where it is one that is taken.
VALUES = {
    "lam": [0.5, 0.0, 1.0, 2.0, 0.25, 3.0, 0.125, 1e-3, 7.5, 0.75, 1e3, 2.5],
    "beta": [0.5, 0.0, 1.0, 2.0, 0.25, 3.0, 0.125, 1e-3, 7.5, 0.75, 10.0, 2.5],
    "eps_low": [0.2, 0.0, 1.0, 0.1, 0.25, 0.3, 0.125, 1e-3, 0.05, 0.75, 0.9, 0.5],
    "eps_high": [0.2, 0.0, 1.0, 0.1, 0.25, 0.3, 0.125, 1e-3, 0.05, 0.75, 2.0, 0.5],
    "temperature": [0.7, 1.0, 0.5, 0.9, 1.1, 2.0, 1.5, 0.25, 3.0, 0.8, 1.25, 0.6],
    "entropy_coef": [0.01, -0.01, 0.1, 0.2, 1e-3, 0.5, -0.5, 0.05, 1.0, 0.3, 0.02, 0.4],
    "dual_clip": [3.0, 1.5, 2.0, 1.1, 4.0, 5.0, 10.0, 1.25, 2.5, 7.0, 100.0, 1.01],
    "cost_limit": [0.5, 0.0, -1.0, 2.0, 0.25, 3.0, -0.125, 1e-3, 7.5, 0.75, 10.0, 2.5],
    "divisor": [7.0, 1.0, 3.5, 2.0, 100.0, 0.5, 12.0, 5.0, 64.0, 9.0, 11.0, 13.0],
    "grad_scale": [2.0, 1.0, 0.5, 4.0, 1024.0, 3.0, 0.25, 8.0, 16.0, 32.0, 64.0, 7.0],
    "max_length": [11.0, 1.0, 3.5, 2.0, 100.0, 0.5, 12.0, 5.0, 64.0, 9.0, 10.0, 13.0],
}
AGGREGATION = {"max_length": "seq-mean-token-sum-norm"}


def count_graphs(step: Callable[..., Tensor], calls: list[tuple]) -> int:
    """Compile a function and call it; the results must be those of the function itself. Returns the graphs compiled."""
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), step(*arguments), rtol=1e-6, atol=1e-7)
    return counter.frame_count


@pytest.mark.parametrize("name", VALUES)
def test_twelve_values_of_a_number_compile_at_most_two_graphs(name: str) -> None:
    logits, arguments = make_call("padded", "k3, entropy, importance weights, dual clip")
    arguments |= {"loss_agg_mode": AGGREGATION.get(name, "token-mean"), "cost_limit": 0.5}
    leaf = logits.requires_grad_()

    def step(z: Tensor, value: float) -> Tensor:
        return repo_loss(z, **{**arguments, name: value}).loss

    assert len(set(VALUES[name])) == 12
    assert count_graphs(step, [(leaf, value) for value in VALUES[name]]) <= MOST_GRAPHS


def test_all_numbers_may_vary_together() -> None:
    logits, arguments = make_call("packed", "k3, entropy, importance weights, dual clip")
    arguments["loss_agg_mode"] = "seq-mean-token-sum-norm"
    leaf = logits.requires_grad_()

    def step(z: Tensor, scalars: dict[str, float]) -> Tensor:
        return repo_loss(z, **{**arguments, **scalars}).loss

    rows = zip(*VALUES.values(), strict=True)
    calls = [(leaf, dict(zip(VALUES, row, strict=True))) for row in rows]
    assert count_graphs(step, calls) <= MOST_GRAPHS


@pytest.mark.parametrize("name", ["lam", "beta", "eps_high", "temperature"])
def test_numbers_of_the_linear_loss_compile_at_most_two_graphs(name: str) -> None:
    logits, arguments = make_call("padded", "k3, entropy, importance weights, dual clip")
    hidden, weight = logits.nan_to_num(0.0).requires_grad_(), torch.eye(37, requires_grad=True)

    def step(x: Tensor, value: float) -> Tensor:
        return linear_repo_loss(x, weight, **{**arguments, name: value}).loss

    assert count_graphs(step, [(hidden, value) for value in VALUES[name]]) <= MOST_GRAPHS


@pytest.mark.parametrize("form", ["logits", "linear"])
def test_temperatures_of_log_probabilities_compile_at_most_two_graphs(form: str) -> None:
    logits, ids = torch.randn(4, 9, requires_grad=True), torch.arange(4)
    weight = torch.eye(9)

    def step(z: Tensor, temperature: float) -> Tensor:
        if form == "linear":
            return linear_selective_log_softmax(z, weight, ids, temperature=temperature)
        return selective_log_softmax(z, ids, temperature=temperature)

    assert count_graphs(step, [(logits, value) for value in VALUES["temperature"]]) <= MOST_GRAPHS


def packed_call(lengths: list[int], seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    rows, sequences = sum(lengths), len(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    logits = torch.randn(rows, 17, generator=g).requires_grad_()
    ids = torch.randint(0, 17, (rows,), generator=g)
    mask = torch.rand(rows, generator=g) < 0.8
    values = (torch.randn(sequences, generator=g) for _ in range(3))
    return logits, ids, mask, bounds, *values, torch.full((rows,), -2.8)


PACKED = [[3, 4], [5, 1, 7], [2, 2, 2, 9, 3], [40, 30], [6, 8, 10, 12]]


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "seq-mean-token-mean", "none"])
@pytest.mark.parametrize("form", ["logits", "linear"])
@pytest.mark.pairwise
def test_other_lengths_and_numbers_of_sequences_do_not_recompile(form: str, loss_agg_mode: str) -> None:
    counter, weight = CompileCounter(), torch.eye(17)

    def step(z: Tensor, ids: Tensor, mask: Tensor, bounds: Tensor, reward: Tensor, costs: Tensor, limit: Tensor,
             old: Tensor) -> Tensor:  # fmt: skip
        options: dict[str, Any] = {"lam": 0.5, "beta": 0.1, "ref_logps": old, "loss_agg_mode": loss_agg_mode}
        tensors = {"response_mask": mask, "cu_seqlens": bounds, "costs": costs, "cost_limit": limit}
        if form == "linear":
            return linear_repo_loss(z, weight, ids, old, reward, **tensors, **options).loss.sum()
        return repo_loss(z, ids, old, reward, **tensors, **options).loss.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for seed, lengths in enumerate(PACKED):
        call = packed_call(lengths, seed)
        torch.testing.assert_close(compiled(*call), step(*call), rtol=1e-6, atol=1e-7)
    assert counter.frame_count == 1
